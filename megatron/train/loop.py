"""The training loop: fetch a global batch, take a step, advance the counters, then call the hooks in their order."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from megatron.config.batch import global_batch_size_at
from megatron.config.notation import parse_iteration_ranges
from megatron.contract import Batch
from megatron.train.evaluate import Loader
from megatron.train.report import StepReport
from megatron.train.run import Run
from megatron.train.sinks import Sink
from megatron.train.skips import check_skip
from megatron.train.stopping import Request, Stopping


class StepTimer:
    """A clock that stops in `paused` blocks, so that differences of `now` are seconds of training."""

    def __init__(self) -> None:
        self._paused_seconds = 0.0

    def now(self) -> float:
        """Return the seconds on the clock."""
        return time.perf_counter() - self._paused_seconds

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the clock inside the block, whose duration is not training time."""
        began = time.perf_counter()
        yield
        self._paused_seconds += time.perf_counter() - began


@dataclass
class Training:
    """State of the training loop, which hooks may read and change.

    Attributes:
        run: the parts of the run; `run.state` holds the counters that checkpoints save.
        loader: loads the training samples from the run's position on; None for an evaluation, which trains nothing.
        sinks: receive the reports; empty on all ranks but the first.
        stopping: lets all ranks agree on whether to stop.
        start: number of iterations done when this process started; 0 for a fresh start.
        request: the last agreement of the ranks; training ends when its `stop` is set.
        extra_metrics: additional values for log lines, by name. Hooks called before `Log` set them, at least on the first rank.
        timer: measures the seconds of training.
        step_began: time on `timer` at which the current step began.
    """

    run: Run
    loader: Loader | None
    sinks: list[Sink]
    stopping: Stopping
    start: int
    request: Request = field(default_factory=Request)
    extra_metrics: dict[str, float] = field(default_factory=dict)
    timer: StepTimer = field(default_factory=StepTimer)
    step_began: float = 0.0

    @property
    def iteration(self) -> int:
        """Number of iterations that are done."""
        return self.run.state.iteration

    @property
    def last_iteration(self) -> int:
        """The iteration at which the run ends."""
        return self.run.config.batch.iterations

    def next_batches(self) -> list[Batch]:
        """Return this rank's micro-batches of the next step.

        Raises:
            ValueError: there are no training samples.
        """
        if self.loader is None:
            raise ValueError("there are no training samples")
        self.step_began = self.timer.now()
        self.run.job.watch.doing("reading training data", alone=True)
        return self.loader.next_batches(global_batch_size_at(self.run.config.batch, self.run.state.consumed_samples))

    def step(self, batches: Sequence[Batch]) -> StepReport:
        """Take a step over this rank's micro-batches, unless --skip-train-iterations names the iteration. Collective."""
        batch, state = self.run.config.batch, self.run.state
        # `state.iteration` counts completed steps; the flag numbers steps from 1.
        if all(state.iteration + 1 not in numbers for numbers in parse_iteration_ranges(batch.skip_train_iterations)):
            return self.run.step(batches, state)
        samples = global_batch_size_at(batch, state.consumed_samples)
        tokens = samples * batches[0].tokens.shape[1]  # tokens: [micro_batch, seq]
        return StepReport(0.0, 0.0, skipped=True, nan=False, samples=samples, tokens=tokens, left_out=True)

    def should_stop(self) -> bool:
        """Return whether to abandon an evaluation because the run must stop. Collective; called between its steps."""
        agreed = self.stopping.ask()
        if agreed.stop is not None:  # a request to save waits for the next training step
            self.request = agreed
        return agreed.stop is not None

    def log(self, text: str) -> None:
        """Send a line of text to every sink."""
        for sink in self.sinks:
            sink.event(text)


class Hook:
    """Work between the steps of a run, on all ranks. A subclass overrides the methods that it needs."""

    def before_training(self, training: Training) -> None:
        """Called once, before the first step of this process."""

    def after_step(self, training: Training, report: StepReport) -> None:
        """Called after every step, when the counters have advanced."""

    def after_training(self, training: Training) -> None:
        """Called once, after the last step of this process, even if the run was stopped, but not after an error."""


def train(training: Training, hooks: Sequence[Hook]) -> None:
    """Train to the last iteration, or until a hook or an evaluation asks for a stop. Collective.

    Args:
        training: the state of the loop; afterwards, its `request` tells whether training was stopped.
        hooks: called after every step, in this order.
    """
    for hook in hooks:
        hook.before_training(training)
    while training.request.stop is None and training.iteration < training.last_iteration:
        batches = training.next_batches()
        report = training.step(batches)
        advance(training.run, report)
        for hook in hooks:
            hook.after_step(training, report)
    for hook in hooks:
        hook.after_training(training)


def is_due(iteration: int, interval: int | None) -> bool:
    """Return whether work that is done every `interval` iterations, or never if that is None, is due after `iteration`."""
    return interval is not None and interval > 0 and iteration % interval == 0


def advance(run: Run, report: StepReport) -> None:
    """Update the counters after a step. A skipped step consumes its samples, but does not advance the schedules.

    Raises:
        TrainingError: too many steps were skipped.
    """
    state = run.state
    state.iteration += 1
    state.consumed_samples += report.samples
    state.consumed_tokens += report.tokens
    state.window_nan += report.nan
    # The learning rate follows scheduled_samples, the data position consumed_samples; a skipped step advances only the latter.
    if not report.skipped:
        state.scheduled_samples += report.samples
        state.consecutive_skips = 0
        # A single non-finite loss would make the average of the log line non-finite.
        if math.isfinite(report.lm_loss + (report.sop_loss or 0.0)):
            state.window_loss += report.lm_loss
            state.window_sop += report.sop_loss or 0.0
            state.window_steps += 1
        return
    state.window_skipped += 1
    if report.left_out:
        state.skipped_samples += report.samples
        return
    state.consecutive_skips += 1  # counts failed steps, not those that --skip-train-iterations names
    check_skip(state, report, run.config.optim)
