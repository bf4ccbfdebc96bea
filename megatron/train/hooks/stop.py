"""The ends of training: on request, and at --exit-interval."""

from __future__ import annotations

from megatron.train.loop import Hook, Training, is_due
from megatron.train.report import StepReport
from megatron.train.stopping import Request


class AgreeOnStop(Hook):
    """Asks at every boundary of a step whether to stop or to save now; collective.

    Args:
        evaluations_follow: whether the finished model is evaluated. Where it is not, the last step is the end, and a request
            during that step came too late to be one.
    """

    def __init__(self, *, evaluations_follow: bool) -> None:
        self._evaluations_follow = evaluations_follow

    def after_step(self, training: Training, report: StepReport) -> None:
        # How long the next step will take at least, by which a time limit must be met early.
        seconds = training.timer.now() - training.step_began
        save_due = is_due(training.iteration, training.run.config.checkpoint.save_interval)
        training.request = training.stopping.ask(seconds, save_due=save_due)

    def after_training(self, training: Training) -> None:
        if training.iteration >= training.last_iteration and not self._evaluations_follow:
            training.request = Request()


class ExitInterval(Hook):
    """Stops at multiples of --exit-interval, with a checkpoint."""

    def after_step(self, training: Training, report: StepReport) -> None:
        interval = training.run.config.batch.exit_interval
        more = training.iteration < training.last_iteration
        if more and training.request.stop is None and is_due(training.iteration, interval):
            training.request = Request(f"--exit-interval {interval}", save=True)
