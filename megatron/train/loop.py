"""The training loop: steps, and what happens between them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import IntEnum

import torch

from megatron.config.batch_size import global_batch_size_at
from megatron.config.iterations import ranges_of
from megatron.parallel.collectives import all_reduce
from megatron.train.errors import TrainingError
from megatron.train.evaluate import Loader, evaluate
from megatron.train.report import Evaluation, LogContext, Metrics, StepReport
from megatron.train.run import Run
from megatron.train.sinks import Sink


class Exit(IntEnum):
    """How training ended, as an exit status. stopped: on request; with a checkpoint, start again to go on."""

    FINISHED = 0
    STOPPED = 75


@dataclass
class Surroundings:
    """What the loop uses beside the run; sinks are the first rank's.

    train: at the run's position; None to train nothing. valid, test: open the held-out samples at their beginning, so
    that every evaluation sees the same ones; None where there are none. flops: of one sample, forward and backward, for
    the whole model. save: writes a checkpoint of the current state. began: when the program started, `time.monotonic()`.
    """

    train: Loader | None
    valid: Callable[[], Loader] | None
    test: Callable[[], Loader] | None
    sinks: Sequence[Sink]
    save: Callable[[], None] | None
    flops: float
    peak_tflops: float | None
    began: float


def train(run: Run, around: Surroundings) -> Exit:
    """Train to the last iteration, or until a stop is asked for. Collective."""
    config, state = run.config, run.state
    total = config.batch.train_iters or 0
    saved_at = state.iteration
    left_out = ranges_of(config.batch.skip_train_iterations)
    clock = Clock(run, around)
    while state.iteration < total and around.train is not None:
        size = global_batch_size_at(config.batch, state.consumed_samples)
        run.job.watch.doing("reading training data", alone=True)
        batches = around.train.next_batches(size)
        if any(state.iteration + 1 in numbers for numbers in left_out):
            report = without_update(size, size * batches[0].tokens.shape[1])
        else:
            report = run.step(batches, state)
        advance(run, report)
        tell(run, report, around.sinks)
        clock.after_step(report)
        iteration = state.iteration
        if iteration < total and due(iteration, config.eval.eval_interval) and around.valid is not None:
            with clock.paused():
                held_out(run, around, around.valid, "validation", f"iteration {iteration}")
        stopping = iteration < total and stop_asked(run, around.began)
        if around.save is not None and (stopping or due(iteration, config.checkpoint.save_interval)):
            run.job.watch.doing("saving a checkpoint")
            with clock.paused():
                around.save()
            saved_at = iteration
        if stopping:
            return Exit.STOPPED
    if around.save is not None and saved_at != state.iteration:
        run.job.watch.doing("saving a checkpoint")
        around.save()
    return Exit.FINISHED


def due(iteration: int, interval: int | None) -> bool:
    return interval is not None and interval > 0 and iteration % interval == 0


def without_update(samples: int, tokens: int) -> StepReport:
    """A step that --skip-train-iterations leaves out."""
    return StepReport(0.0, 0.0, skipped=True, nan=False, samples=samples, tokens=tokens, left_out=True)


def tell(run: Run, report: StepReport, sinks: Sequence[Sink]) -> None:
    """One line on a step that was left out, or in which something was not finite."""
    text = f"iteration {run.state.iteration}: "
    if report.left_out:
        text += "left out, as --skip-train-iterations says; its samples are passed over"
    elif report.skipped:
        text += f"skipped: {report.nonfinite or 'the norm of the gradient is not finite'}"
        text += f"; loss scale {run.state.scaler.scale:g} from now on"
    elif report.nonfinite is not None:
        text += f"{report.nonfinite}; the gradient was, and the update was made"
    else:
        return
    for sink in sinks:
        sink.event(text)


def advance(run: Run, report: StepReport) -> None:
    """Count the step. A skipped one consumes its samples, but moves no schedule."""
    state, optim = run.state, run.config.optim
    state.iteration += 1
    state.consumed_samples += report.samples
    state.consumed_tokens += report.tokens
    state.window_nan += report.nan
    if not report.skipped:
        state.scheduled_samples += report.samples
        state.consecutive_skips = 0
        state.window_loss += report.lm_loss
        state.window_steps += 1
        return
    state.window_skipped += 1
    if report.left_out:
        return
    state.consecutive_skips += 1
    what = f"iteration {state.iteration}: the gradient is not finite (norm {report.grad_norm}, loss {report.lm_loss})"
    if report.nonfinite is not None:
        what += f": {report.nonfinite}"
    if optim.on_nonfinite == "abort":
        raise TrainingError(f"{what}; --on-nonfinite abort stops here. Lower --lr, or skip such steps with --on-nonfinite skip")
    if state.consecutive_skips >= optim.max_consecutive_skips:
        raise TrainingError(
            f"{what}, as in the {state.consecutive_skips - 1} steps before; --max-consecutive-skips stops here. "
            "Go on from an earlier checkpoint with a lower --lr"
        )


def stop_asked(run: Run, began: float) -> bool:
    """Whether to save and stop now; all ranks agree."""
    batch = run.config.batch
    if due(run.state.iteration, batch.exit_interval):
        return True
    if batch.exit_duration_in_mins is None:
        return False
    late = time.monotonic() - began > 60.0 * batch.exit_duration_in_mins
    return bool(all_reduce(torch.tensor(float(late), device=run.job.device), run.mesh.world, "max").item())


def held_out(run: Run, around: Surroundings, samples: Callable[[], Loader], split: str, title: str) -> Evaluation:
    """Evaluate one split and tell the sinks. Collective. Training goes on as if this had not been."""
    size, steps = run.config.batch.global_batch_size or 1, run.config.eval.eval_iters
    run.job.watch.doing(f"opening the {split} data", alone=True)
    loader = samples()
    try:
        loss = evaluate(run.pipeline, loader, run.mesh, steps=steps, global_batch_size=size, watch=run.job.watch)
    finally:
        loader.close()
    result = Evaluation(run.state.iteration, split, loss, run.state.consumed_samples)
    for sink in around.sinks:
        sink.evaluation(result, title)
    return result


class Clock:
    """Times the steps, leaves out what is not training, and feeds the sinks."""

    def __init__(self, run: Run, around: Surroundings) -> None:
        self.run, self.around = run, around
        self._mark = self._step_mark = time.perf_counter()
        self._steps = self._tokens = self._samples = 0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside is not training time."""
        began = time.perf_counter()
        yield
        away = time.perf_counter() - began
        self._mark += away
        self._step_mark += away

    def after_step(self, report: StepReport) -> None:
        """The step's own values to every sink; at the log interval also the averages since the last line."""
        state, now = self.run.state, time.perf_counter()
        self._steps += 1
        self._tokens += report.tokens
        self._samples += report.samples
        if not self.around.sinks and not due(state.iteration, self.run.config.log.log_interval):
            return
        own = self._metrics(report, now - self._step_mark, 1, report.tokens, report.samples)
        own = replace(own, lm_loss=None if report.skipped else report.lm_loss)
        self._step_mark = now
        elapsed = now - self._mark
        context = LogContext(
            global_batch_size=report.samples,
            train_iters=self.run.config.batch.train_iters or 0,
            world_size=self.run.job.place.world_size,
            zeros=report.zeros,
            params_norm=report.params_norm,
            eta_seconds=elapsed / self._steps * ((self.run.config.batch.train_iters or 0) - state.iteration),
        )
        for sink in self.around.sinks:
            sink.step(own, context)
        if not due(state.iteration, self.run.config.log.log_interval):
            return
        averages = self._metrics(report, elapsed, self._steps, self._tokens, self._samples)
        averages = replace(averages, lm_loss=state.window_loss / state.window_steps if state.window_steps else None)
        for sink in self.around.sinks:
            sink.line(averages, context)
        state.window_loss, state.window_steps, state.window_skipped, state.window_nan = 0.0, 0, 0, 0
        self._mark, self._steps, self._tokens, self._samples = now, 0, 0, 0

    def _metrics(self, report: StepReport, seconds: float, steps: int, tokens: int, samples: int) -> Metrics:
        state, device = self.run.state, self.run.job.device
        tflops = self.around.flops * samples / seconds / self.run.job.place.world_size / 1e12
        return Metrics(
            iteration=state.iteration,
            lm_loss=None,
            grad_norm=None if report.left_out else report.grad_norm,
            learning_rate=self.run.schedule.rate(state.scheduled_samples),
            loss_scale=state.scaler.scale,
            skipped_iterations=state.window_skipped,
            nan_iterations=state.window_nan,
            consumed_samples=state.consumed_samples,
            consumed_tokens=state.consumed_tokens,
            iteration_time_ms=1000.0 * seconds / steps,
            tokens_per_second=tokens / seconds,
            tflops_per_gpu=tflops,
            mfu=tflops / self.around.peak_tflops if self.around.peak_tflops else None,
            peak_memory_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        )
