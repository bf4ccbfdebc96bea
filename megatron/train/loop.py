"""The training loop: steps, and what happens between them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from enum import IntEnum

import torch

from megatron.config.batch import full_batch_size, global_batch_size_at
from megatron.config.notation import iteration_ranges
from megatron.launch.exit_report import tell_launcher
from megatron.train.errors import TrainingError
from megatron.train.evaluate import Loader, evaluate
from megatron.train.progress import Progress
from megatron.train.report import Evaluation, LogContext, Metrics, StepReport
from megatron.train.run import Run
from megatron.train.saving import Saver
from megatron.train.sinks import Sink
from megatron.train.skips import Skips, lost
from megatron.train.stopping import Request, Stopping


class Exit(IntEnum):
    """How training ended, as an exit status. stopped: on request; with a checkpoint, start again to go on."""

    FINISHED = 0
    STOPPED = 75


@dataclass
class Surroundings:
    """What the loop uses beside the run; sinks are the first rank's.

    train: at the run's position; None to train nothing. valid, test: open the held-out samples at their beginning, so that
    every evaluation sees the same ones; None where there are none. flops: of one sample, forward and backward, for the
    whole model; causal_share: what is left of them with the causal half of attention, None for BERT. saver: writes
    checkpoints; None without --save. stopping: says when to stop. progress: the file of the run's slices. start: the
    iteration that this slice began after. skips: its steps without an update. score: what else is measured and told, every
    score_interval iterations; it is handed what to ask whether to give up. again: what to say of how this run goes on.
    """

    train: Loader | None
    valid: Callable[[], Loader] | None
    test: Callable[[], Loader] | None
    sinks: Sequence[Sink]
    saver: Saver | None
    flops: float
    causal_share: float | None
    peak_tflops: float | None
    stopping: Stopping
    progress: Progress
    start: int = 0
    skips: Skips = field(default_factory=Skips)
    score: Callable[[GiveUp], object] | None = None
    score_interval: int | None = None
    again: str = "start again to go on"

    def scores(self, iteration: int) -> bool:
        """Whether the score is due after an iteration."""
        return self.score is not None and due(iteration, self.score_interval)


class GiveUp:
    """Asked between the steps of an evaluation, by all ranks: whether to leave it, since the run is to stop. Collective.

    request: what was agreed last.
    """

    def __init__(self, stopping: Stopping) -> None:
        self._stopping, self.request = stopping, Request()

    def __call__(self) -> bool:
        self.request = self._stopping.ask()
        return self.request.stop is not None


def train(run: Run, around: Surroundings) -> Exit:
    """Train to the last iteration, or until a stop is asked for. Collective."""
    config, state = run.config, run.state
    total = config.batch.train_iters or 0
    saved_at = state.iteration
    left_out = iteration_ranges(config.batch.skip_train_iterations)
    request = validate(run, around) if state.evaluation_due and state.iteration < total else Request()
    clock = Clock(run, around)
    while request.stop is None and state.iteration < total and around.train is not None:
        began = time.perf_counter()
        size = global_batch_size_at(config.batch, state.consumed_samples)
        run.job.watch.doing("reading training data", alone=True)
        batches = around.train.next_batches(size)
        if any(state.iteration + 1 in numbers for numbers in left_out):
            report = without_update(size, size * batches[0].tokens.shape[1])
        else:
            report = run.step(batches, state)
        around.skips.count(report)
        advance(run, report)
        tell(run, report, around.sinks)
        clock.after_step(report)
        iteration, more = state.iteration, state.iteration < total
        if around.saver is not None:
            around.saver.check()
        if run.job.is_main and iteration == around.start + 1:
            around.progress.moved()
        save_due = due(iteration, config.checkpoint.save_interval)
        request = around.stopping.ask(time.perf_counter() - began, save_due=save_due)
        validates = around.valid is not None and due(iteration, config.eval.eval_interval)
        state.evaluation_due = more and (validates or around.scores(iteration))
        if state.evaluation_due and request.stop is None:
            with clock.paused():
                request = validate(run, around, request)
        if more and request.stop is None and due(iteration, config.batch.exit_interval):
            request = Request(f"--exit-interval {config.batch.exit_interval}", save=True)
        if around.saver is not None and (save_due or request.save):
            with clock.paused():
                around.saver.save()
            around.stopping.saved()
            saved_at = iteration
    if request.stop is not None and (state.iteration < total or around.valid is not None or around.test is not None):
        return stop(run, around, request)
    if around.saver is not None and saved_at != state.iteration:
        around.saver.save()
    return Exit.FINISHED


def stop(run: Run, around: Surroundings, request: Request) -> Exit:
    """End the slice with one whole checkpoint, and say why. Collective.

    TrainingError where there is none to go on from, or no slice comes any further.
    """
    tell_skips(run, around)
    steps = run.state.iteration - around.start
    where, why = f"stopping after iteration {run.state.iteration}", request.stop or "a request"
    if around.saver is not None:
        if steps:
            save_last(run, around.saver)
        if not steps and (wrong := around.progress.too_short(why)) is not None:
            note(run, around.progress, idle=around.progress.idle + 1)
            raise TrainingError(wrong)
        note(run, around.progress, idle=0 if steps else around.progress.idle + 1, stopped=True)
    around.stopping.obeyed()
    if around.saver is None and request.outside and around.train is not None:
        raise TrainingError(f"{where}: {why}; nothing is saved, because there is no --save")
    kept = "checkpoint saved" if steps else "nothing new to save"
    if around.train is None:
        kept = "the evaluation is not finished"
    goes_on = around.saver is not None or around.train is None
    if not goes_on and (wrong := lost(run.state)) is not None:  # the stop is the end
        raise TrainingError(f"{where}: {why}; {wrong}")
    again = around.again if around.saver is not None else "start again to go on"
    text = f"{where}: {why}; " + (f"{kept}; {again}" if goes_on else "there is no --save, so nothing is kept")
    for sink in around.sinks:
        sink.event(text)
    if around.saver is not None:
        tell_launcher(text)
    return Exit.STOPPED


def save_last(run: Run, saver: Saver) -> None:
    """Have the state as it is now in a whole checkpoint on the disk, whatever that takes. Collective.

    TrainingError where it cannot be written, also with --on-save-error continue: nothing comes after it.
    """
    iteration = run.state.iteration
    saver.finish()
    if saver.saved != iteration:
        saver.save()
        saver.finish()
    if saver.saved != iteration:
        raise TrainingError(
            f"the last checkpoint, of iteration {iteration}, could not be saved to {run.config.checkpoint.save}, as was said "
            "above; make room there and start again with --auto-resume, from the newest one that is whole"
        )


def note(run: Run, progress: Progress, *, finished: int | None = None, idle: int = 0, stopped: bool = False) -> None:
    """The first rank's note of how this slice ended."""
    if run.job.is_main:
        progress.write(finished=finished, idle=idle, stopped=stopped)


def validate(run: Run, around: Surroundings, request: Request | None = None) -> Request:
    """The evaluation that is due after this iteration; what was asked for meanwhile. Collective."""
    iteration, asked, interval = run.state.iteration, Request(), run.config.eval.eval_interval
    if around.valid is not None and interval and (due(iteration, interval) or not around.scores(iteration)):
        asked = held_out(run, around, around.valid, "validation", f"iteration {iteration}")
    if asked.stop is None and around.score is not None and around.scores(iteration):
        give_up = GiveUp(around.stopping)
        around.score(give_up)
        asked = give_up.request
    run.state.evaluation_due = asked.stop is not None
    return asked if asked.stop is not None or request is None else request


def final_evaluations(run: Run, around: Surroundings) -> Exit:
    """Validation and test loss of the finished model. Collective. A stop leaves both to the next start."""
    draw = f"{run.config.eval.eval_iters * full_batch_size(run.config.batch)}-sample draw"
    for samples, split in ((around.valid, "validation"), (around.test, "test")):
        if samples is None:
            continue
        request = held_out(run, around, samples, split, f"iteration {run.state.iteration} on {draw} from {split} set")
        if request.stop is not None:
            return stop(run, around, request)
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
        if math.isfinite(report.lm_loss + (report.sop_loss or 0.0)):
            state.window_loss += report.lm_loss
            state.window_sop += report.sop_loss or 0.0
            state.window_steps += 1
        return
    state.window_skipped += 1
    if report.left_out:
        state.skipped_samples += report.samples
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


def held_out(run: Run, around: Surroundings, samples: Callable[[], Loader], split: str, title: str) -> Request:
    """Evaluate one split and tell the sinks. Collective. Training goes on as if this had not been.

    Gives what was agreed last; with a stop the evaluation was given up, and nothing is told.
    """
    size, steps = full_batch_size(run.config.batch), run.config.eval.eval_iters
    run.job.watch.doing(f"opening the {split} data", alone=True)
    loader, give_up = samples(), GiveUp(around.stopping)
    try:
        losses = evaluate(
            run.pipeline, loader, run.mesh, steps=steps, global_batch_size=size, watch=run.job.watch, give_up=give_up
        )
    finally:
        loader.close()
    if losses is not None:
        lm, sop = losses
        sop_loss = sop if run.config.model.predicts_order else None
        result = Evaluation(run.state.iteration, split, lm, run.state.consumed_samples, sop_loss)
        for sink in around.sinks:
            sink.evaluation(result, title)
    return give_up.request


def finish(run: Run, around: Surroundings) -> None:
    """The run is at its end, and remembers that. Collective. TrainingError where its last steps were all skipped."""
    if around.train is None:
        return
    if around.saver is not None and run.state.iteration > around.start:
        save_last(run, around.saver)
    tell_skips(run, around)
    if (wrong := lost(run.state)) is not None:
        raise TrainingError(wrong)
    if around.saver is not None:
        note(run, around.progress, finished=run.state.iteration)


def tell_skips(run: Run, around: Surroundings) -> None:
    """The closing line on steps that were skipped."""
    if (text := around.skips.summary(run.state)) is not None:
        for sink in around.sinks:
            sink.event(text)


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
        if not report.left_out:
            self._steps += 1
            self._tokens += report.tokens
            self._samples += report.samples
        if not self.around.sinks and not due(state.iteration, self.run.config.log.log_interval):
            return
        own = self._metrics(report, now - self._step_mark, int(not report.left_out), report.tokens, report.samples)
        if not report.skipped:
            own = replace(own, lm_loss=report.lm_loss, sop_loss=report.sop_loss)
        self._step_mark = now
        elapsed, to_go = now - self._mark, (self.run.config.batch.train_iters or 0) - state.iteration
        schedule = self.run.schedule
        context = LogContext(
            global_batch_size=report.samples,
            train_iters=self.run.config.batch.train_iters or 0,
            world_size=self.run.job.place.world_size,
            zeros=report.zeros,
            params_norm=report.params_norm,
            eta_seconds=elapsed / self._steps * to_go if self._steps else None,
            skipped_samples=state.skipped_samples,
            decoupled_lr=schedule.decoupled_rate(state.scheduled_samples) if schedule.decoupled else None,
        )
        for sink in self.around.sinks:
            sink.step(own, context)
        if not due(state.iteration, self.run.config.log.log_interval):
            return
        averages = self._metrics(report, elapsed, self._steps, self._tokens, self._samples)
        if state.window_steps:
            averages = replace(averages, lm_loss=state.window_loss / state.window_steps)
            if self.run.config.model.predicts_order:
                averages = replace(averages, sop_loss=state.window_sop / state.window_steps)
        for sink in self.around.sinks:
            sink.line(averages, context)
        state.window_loss = state.window_sop = 0.0
        state.window_steps = state.window_skipped = state.window_nan = 0
        self._mark, self._steps, self._tokens, self._samples = now, 0, 0, 0

    def _metrics(self, report: StepReport, seconds: float, steps: int, tokens: int, samples: int) -> Metrics:
        """The values of steps that took so long together. Steps that were left out are none of them: they trained nothing."""
        state, device = self.run.state, self.run.job.device
        tflops = self.around.flops * samples / seconds / self.run.job.place.world_size / 1e12 if steps else None
        peak, share = self.around.peak_tflops, self.around.causal_share
        mfu = tflops / peak if tflops is not None and peak else None
        return Metrics(
            iteration=state.iteration,
            lm_loss=None,
            sop_loss=None,
            grad_norm=None if report.left_out else report.grad_norm,
            learning_rate=self.run.schedule.rate(state.scheduled_samples),
            loss_scale=state.scaler.scale,
            skipped_iterations=state.window_skipped,
            nan_iterations=state.window_nan,
            consumed_samples=state.consumed_samples,
            consumed_tokens=state.consumed_tokens,
            iteration_time_ms=1000.0 * seconds / steps if steps else None,
            tokens_per_second=tokens / seconds if steps else None,
            tflops_per_gpu=tflops,
            mfu=mfu,
            mfu_causal=None if mfu is None or share is None else mfu * share,
            peak_memory_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        )
