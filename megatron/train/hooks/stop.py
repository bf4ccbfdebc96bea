"""Stop training on request, and at --exit-interval."""

from __future__ import annotations

from megatron.train.loop import Hook, Training, is_due
from megatron.train.report import StepReport
from megatron.train.stopping import Request


class AgreeOnStop(Hook):
    """Lets the ranks agree after every step on whether to stop or to save now. Collective.

    Args:
        evaluations_follow: the finished model will be evaluated. If not, a request to stop during the last step is ignored,
            since no work is left to stop.
    """

    def __init__(self, *, evaluations_follow: bool) -> None:
        self._evaluations_follow = evaluations_follow

    def after_step(self, training: Training, report: StepReport) -> None:
        # The last step's duration estimates that of the next one, which must end before a time limit.
        step_seconds = training.timer.now() - training.step_began
        save_due = is_due(training.iteration, training.run.config.checkpoint.save_interval)
        training.request = training.stopping.ask(step_seconds, save_due=save_due)

    def after_training(self, training: Training) -> None:
        if training.iteration >= training.last_iteration and not self._evaluations_follow:
            training.request = Request()


class ExitInterval(Hook):
    """Stops at multiples of --exit-interval, with a checkpoint."""

    def after_step(self, training: Training, report: StepReport) -> None:
        interval = training.run.config.batch.exit_interval
        goes_on = training.iteration < training.last_iteration
        if goes_on and training.request.stop is None and is_due(training.iteration, interval):
            training.request = Request(f"--exit-interval {interval}", save=True)
