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
    """A clock that stands still in `paused` blocks, so that differences of `now` are seconds of training."""

    def __init__(self) -> None:
        self._away = 0.0  # seconds spent in paused blocks

    def now(self) -> float:
        """Return the seconds on the clock."""
        return time.perf_counter() - self._away

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the clock inside the block: what happens there is not training time."""
        began = time.perf_counter()
        yield
        self._away += time.perf_counter() - began


@dataclass
class Training:
    """A run under way, from its start or from a checkpoint on, as hooks see it.

    Attributes:
        run: what a step needs; `run.state` are the counters that checkpoints keep.
        loader: the training samples from the run's position on; None to train nothing.
        sinks: where reports go. The first rank's; the others have none.
        stopping: finds out whether all ranks are to stop.
        start: the iteration after which this process began.
        request: what was agreed last; training ends where it says stop.
        extra_metrics: more values for the log lines, by name. A hook before `Log` sets them, on the first rank at least.
        timer: counts the seconds of training.
        step_began: when the step did, on the timer.
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
        """The iteration at which the run is at its end."""
        return self.run.config.batch.iterations

    def next_batches(self) -> list[Batch]:
        """Return this rank's micro-batches of the next step.

        Raises:
            ValueError: there is nothing to train.
        """
        if self.loader is None:
            raise ValueError("there are no training samples")
        self.step_began = self.timer.now()
        self.run.job.watch.doing("reading training data", alone=True)
        return self.loader.next_batches(global_batch_size_at(self.run.config.batch, self.run.state.consumed_samples))

    def step(self, batches: Sequence[Batch]) -> StepReport:
        """Take a step over this rank's micro-batches, or pass over them, as --skip-train-iterations says. Collective."""
        batch, state = self.run.config.batch, self.run.state
        # The counter has not advanced yet, and the flag counts from 1.
        if all(state.iteration + 1 not in numbers for numbers in parse_iteration_ranges(batch.skip_train_iterations)):
            return self.run.step(batches, state)
        samples = global_batch_size_at(batch, state.consumed_samples)
        tokens = samples * batches[0].tokens.shape[1]  # tokens: [micro_batch, seq]
        return StepReport(0.0, 0.0, skipped=True, nan=False, samples=samples, tokens=tokens, left_out=True)

    def should_stop(self) -> bool:
        """Ask between two steps of an evaluation whether to give it up, since the run is to stop. Collective."""
        asked = self.stopping.ask()
        if asked.stop is not None:  # a save that is due waits for the next step
            self.request = asked
        return asked.stop is not None

    def log(self, text: str) -> None:
        """Tell every sink something that is worth a line of its own."""
        for sink in self.sinks:
            sink.event(text)


class Hook:
    """Something that is done between the steps of a run, on all ranks; a hook overrides what it cares for."""

    def before_training(self, training: Training) -> None:
        """Called once, before the first step of this process."""

    def after_step(self, training: Training, report: StepReport) -> None:
        """Called after every step, when the counters have advanced."""

    def after_training(self, training: Training) -> None:
        """Called once, after the last step of this process, also where it was stopped; not after an error."""


def train(training: Training, hooks: Sequence[Hook]) -> None:
    """Train to the last iteration, or until a hook or an evaluation asks for a stop. Collective.

    Args:
        training: the run, whose `request` says in the end whether it was stopped.
        hooks: what else is done, in this order after every step.
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
    """Return whether something that is done every so many iterations is due after this one."""
    return interval is not None and interval > 0 and iteration % interval == 0


def advance(run: Run, report: StepReport) -> None:
    """Count the step. A skipped one consumes its samples, but moves no schedule.

    Raises:
        TrainingError: no more steps may be skipped.
    """
    state = run.state
    state.iteration += 1
    state.consumed_samples += report.samples
    state.consumed_tokens += report.tokens
    state.window_nan += report.nan
    # The learning rate follows scheduled_samples, the data position consumed_samples: a skipped step moves the second alone.
    if not report.skipped:
        state.scheduled_samples += report.samples
        state.consecutive_skips = 0
        # One infinite loss would spoil the average of the whole log line.
        if math.isfinite(report.lm_loss + (report.sop_loss or 0.0)):
            state.window_loss += report.lm_loss
            state.window_sop += report.sop_loss or 0.0
            state.window_steps += 1
        return
    state.window_skipped += 1
    if report.left_out:
        state.skipped_samples += report.samples
        return
    state.consecutive_skips += 1  # of steps that failed, not of those that a flag left out
    check_skip(state, report, run.config.optim)
