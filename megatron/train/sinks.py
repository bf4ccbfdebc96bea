"""Write the reports of a run to sinks, on rank 0: console, JSON lines and TensorBoard; for W&B see `wandb_sink.py`."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Literal, TextIO

from megatron.config.schema import LogConfig
from megatron.files.pending import write_whole
from megatron.files.regular import MAX_METRICS_BYTES, read_bytes
from megatron.files.side import SideFile, warn, warning_on_error
from megatron.launch.packages import install_command
from megatron.train.event_file import EventFile
from megatron.train.report import Evaluation, LogContext, Metrics

Outcome = Literal["finished", "preempted", "failed"]
TRUNCATED = (math.inf, True)  # the `_position` of a line that is not valid, for instance truncated: after all others


class Sink:
    """Receives the reports of a run. A subclass overrides the methods that it needs; the others do nothing."""

    def step(self, metrics: Metrics, context: LogContext) -> None:
        """Write the values of a step; called after every step."""

    def line(self, metrics: Metrics, context: LogContext) -> None:
        """Write the averages since the last log line; called every --log-interval steps."""

    def evaluation(self, result: Evaluation, title: str) -> None:
        """Write the result of an evaluation. title: its name on the console, such as `iteration 100`."""

    def event(self, text: str) -> None:
        """Write the text of an event, such as a skipped step, as a line of its own."""

    def close(self, outcome: Outcome) -> None:
        """Write what has not been written, and close. Called once, at the end of the run or of this slice."""


class Console(Sink):
    """Prints Megatron-LM's log lines, with throughput and remaining time in addition."""

    def __init__(self, out: TextIO) -> None:
        self.out = out

    def line(self, metrics: Metrics, context: LogContext) -> None:
        timestamp = datetime.now().strftime("[%Y-%m-%d %H:%M:%S]")
        print(f"{timestamp}{console_line(metrics, context)}", file=self.out, flush=True)

    def evaluation(self, result: Evaluation, title: str) -> None:
        text = f" validation loss at {title} | lm loss value: {result.lm_loss:.6E} | lm loss PPL: {result.ppl:.6E} | "
        if result.sop_loss is not None:
            text += f"sop loss value: {result.sop_loss:.6E} | "
        rule = "-" * (len(text) + 1)
        print(f"{rule}\n{text}\n{rule}", file=self.out, flush=True)

    def event(self, text: str) -> None:
        print(text, file=self.out, flush=True)


def console_line(metrics: Metrics, context: LogContext) -> str:
    """Return a log line without its timestamp, in the format of Megatron-LM, which users' scripts parse."""
    parts = [
        f" iteration {metrics.iteration:8d}/{context.train_iters:8d}",
        f"consumed samples: {metrics.consumed_samples:12d}",
    ]
    if context.skipped_samples:
        parts.append(f"skipped samples: {context.skipped_samples:12d}")
    if metrics.iteration_time_ms is not None:
        parts.append(f"elapsed time per iteration (ms): {metrics.iteration_time_ms:.1f}")
    parts.append(f"learning rate: {metrics.learning_rate:.3E}")
    if context.decoupled_lr is not None:
        parts.append(f"decoupled learning rate: {context.decoupled_lr:.3E}")
    parts += [f"global batch size: {context.global_batch_size:5d}"]
    if metrics.lm_loss is not None:
        parts.append(f"lm loss: {metrics.lm_loss:.6E}")
    if metrics.sop_loss is not None:
        parts.append(f"sop loss: {metrics.sop_loss:.6E}")
    parts.append(f"loss scale: {metrics.loss_scale:.1f}")
    if metrics.grad_norm is not None:
        parts.append(f"grad norm: {metrics.grad_norm:.3f}")
    if context.zeros is not None:
        parts.append(f"num zeros: {context.zeros:.1f}")
    if context.params_norm is not None:
        parts.append(f"params norm: {context.params_norm:.3f}")
    parts += [
        f"number of skipped iterations: {metrics.skipped_iterations:3d}",
        f"number of nan iterations: {metrics.nan_iterations:3d}",
    ]
    if metrics.tokens_per_second is not None:
        parts.append(f"tokens per second: {metrics.tokens_per_second:.1f}")
    if metrics.tflops_per_gpu is not None:
        parts.append(f"throughput per GPU (TFLOP/s/GPU): {metrics.tflops_per_gpu:.3f}")
    if metrics.mfu is not None:
        causal = "" if metrics.mfu_causal is None else f" (causal half: {100 * metrics.mfu_causal:.1f}%)"
        parts.append(f"MFU: {100 * metrics.mfu:.1f}%{causal}")
    if context.eta_seconds is not None:
        parts.append(f"ETA: {timedelta(seconds=round(context.eta_seconds))}")
    parts += [f"{name}: {value:.6g}" for name, value in metrics.extra.items()]
    return " | ".join(parts) + " |"


class JsonLines(Sink):
    """Writes `metrics.jsonl`: one JSON object per line, written at once, so that a killed run loses none.

    Args:
        path: the file.
        resume_at: the iteration that a resumed run starts from. Lines after it are removed, since the run writes them again and
            each iteration must be in the file once. None removes no lines.
        evaluated: the evaluations at that iteration were completed; if not, their lines are removed, too.
        binary: the model has a binary head; only then lines have the key `sop_loss`.
    """

    def __init__(self, path: Path, resume_at: int | None, *, evaluated: bool = True, binary: bool = False) -> None:
        self.binary = binary
        self._file = SideFile(path, "metrics")
        last = TRUNCATED if resume_at is None else (resume_at, evaluated)
        with warning_on_error(path, "lines of the interrupted run cannot be removed"):
            keep_lines(path, lambda line: _position(line) <= last)

    def line(self, metrics: Metrics, context: LogContext) -> None:
        values = asdict(metrics)
        extra = values.pop("extra")
        if not self.binary:
            del values["sop_loss"]
        self._write(values | {name: value for name, value in extra.items() if name not in values})

    def evaluation(self, result: Evaluation, title: str) -> None:
        values = {"iteration": result.iteration, "split": result.split, "lm_loss": result.lm_loss, "ppl": result.ppl}
        self._write(values if result.sop_loss is None else values | {"sop_loss": result.sop_loss})

    def _write(self, values: dict[str, Any]) -> None:
        # JSON has neither NaN nor infinity; null means unknown.
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        self._file.add(json.dumps(finite).encode() + b"\n")


def keep_lines(path: Path, wanted: Callable[[bytes], bool]) -> None:
    """Remove lines from a file, and a last line that a kill or a full disk has truncated.

    Args:
        path: the file; it need not exist.
        wanted: returns whether to keep a line.
    """
    if not path.is_file():
        return
    lines = read_bytes(path, MAX_METRICS_BYTES).splitlines(keepends=True)
    kept = [line for line in lines if wanted(line)]
    # A last line without a line break was truncated; if it can be parsed, only the line break is missing.
    if kept and not kept[-1].endswith(b"\n"):
        tail = kept.pop()
        kept += [tail + b"\n"] if _position(tail) != TRUNCATED else []
    if kept == lines:
        return
    if kept == lines[: len(kept)]:
        os.truncate(path, sum(map(len, kept)))  # possible even if the disk is full
    else:
        write_whole(path, b"".join(kept))  # writes a new file and renames it


def _position(text: bytes) -> tuple[float, bool]:
    """Return a sort key of a line: its iteration, and whether it is an evaluation, which comes after the training line."""
    try:
        values = json.loads(text)
        return float(values["iteration"]), "split" in values
    except (ValueError, KeyError, TypeError, RecursionError):
        return TRUNCATED


class TensorBoard(Sink):
    """Writes points to TensorBoard with Megatron-LM's tags, over iterations and over samples."""

    def __init__(self, config: LogConfig, resume_at: int | None) -> None:
        self.config = config
        # The first step that this run writes again, so that TensorBoard hides the points of earlier files from it on.
        purge_step = None if resume_at is None else resume_at + 1
        self._file = EventFile(Path(config.tensorboard_dir or "."), config.tensorboard_queue_size, purge_step)

    def step(self, metrics: Metrics, context: LogContext) -> None:
        if metrics.iteration % self.config.tensorboard_log_interval:
            return
        for tag, value in learning_points(self.config, metrics, context).items():
            self._file.scalar(tag, value, metrics.iteration)
            self._file.scalar(f"{tag} vs samples", value, metrics.consumed_samples)
        for tag, value in speed_points(self.config, metrics).items():
            self._file.scalar(tag, value, metrics.iteration)

    def evaluation(self, result: Evaluation, title: str) -> None:
        for name, value in evaluation_points(self.config, result).items():
            self._file.scalar(name, value, result.iteration)
            self._file.scalar(f"{name} vs samples", value, result.consumed_samples)

    def close(self, outcome: Outcome) -> None:
        self._file.flush()


def learning_points(config: LogConfig, metrics: Metrics, context: LogContext) -> dict[str, float]:
    """Return loss, gradient norm and schedule values of a step, by Megatron-LM's tags; unknown values are left out.

    Args:
        config: selects the optional tags.
        metrics: the metrics of the step.
        context: further values of the step.
    """
    values: dict[str, float | None] = {
        "lm loss": metrics.lm_loss,
        "sop loss": metrics.sop_loss,
        "grad-norm": metrics.grad_norm,
        "num-zeros": context.zeros,
        "params-norm": context.params_norm,
    }
    if config.log_learning_rate_to_tensorboard:
        values["learning-rate"] = metrics.learning_rate
    if config.log_loss_scale_to_tensorboard:
        values["loss-scale"] = metrics.loss_scale
    if config.log_batch_size_to_tensorboard:
        values["batch-size"] = context.global_batch_size
    if config.log_world_size_to_tensorboard:
        values["world-size"] = context.world_size
    # These tags take precedence over a hook's metric of the same name.
    return dict(metrics.extra) | {tag: value for tag, value in values.items() if value is not None}


def speed_points(config: LogConfig, metrics: Metrics) -> dict[str, float]:
    """Return time (in seconds), throughput and memory of a step, by Megatron-LM's tags."""
    points: dict[str, float] = {}
    if metrics.iteration_time_ms is not None:
        points["iteration-time"] = metrics.iteration_time_ms / 1000
    if metrics.tflops_per_gpu is not None:
        points["throughput"] = metrics.tflops_per_gpu
    if metrics.mfu is not None:
        points["mfu"] = metrics.mfu
    if metrics.mfu_causal is not None:
        points["mfu-causal"] = metrics.mfu_causal
    if config.log_memory_to_tensorboard and metrics.peak_memory_bytes is not None:
        points["mem-max-allocated-bytes"] = metrics.peak_memory_bytes
    return points


def evaluation_points(config: LogConfig, result: Evaluation) -> dict[str, float]:
    """Return the losses of an evaluation, by Megatron-LM's tags."""
    tag = f"lm loss {result.split}"
    points = {tag: result.lm_loss}
    if config.log_validation_ppl_to_tensorboard:
        points[f"{tag} ppl"] = result.ppl
    if result.sop_loss is not None:
        points[tag.replace("lm", "sop")] = result.sop_loss
    return points


def open_sinks(
    config: LogConfig,
    out: TextIO,
    *,
    resume_at: int | None,
    evaluated: bool = True,
    binary: bool = False,
    wandb: Callable[[], Sink] | None = None,
) -> list[Sink]:
    """Open the sinks that the configuration asks for. If TensorBoard is not installed, print that and go on without it.

    Args:
        config: paths and options of the sinks.
        out: the console.
        resume_at: see `JsonLines`.
        evaluated: see `JsonLines`.
        binary: see `JsonLines`.
        wandb: opens the W&B sink; None without --wandb-project.
    """
    sinks: list[Sink] = [Console(out)]
    if config.metrics_path is not None:
        sinks.append(JsonLines(Path(config.metrics_path), resume_at, evaluated=evaluated, binary=binary))
    if config.tensorboard_dir is not None:
        try:
            sinks.append(TensorBoard(config, resume_at))
        except ImportError:
            command = install_command("tensorboard")
            print(f"TensorBoard is not installed, going on without it: {command}", file=out, flush=True)
        except Exception as error:  # the import of TensorBoard's dependencies can fail in many ways
            warn(config.tensorboard_dir, "TensorBoard cannot be used", error)
    if wandb is not None:
        sinks.append(wandb())
    return sinks
