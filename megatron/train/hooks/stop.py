"""Stop training on request, and at --exit-interval."""

from __future__ import annotations

from megatron.train.loop import Hook, Training, is_due
from megatron.train.report import StepReport
from megatron.train.stopping import Request


class AgreeOnStop(Hook):
    """Lets the ranks agree after every step on whether to stop or to save now. Collective.

    Args:
        evaluations_follow: the finished model is evaluated. If it is not, a request to stop during the last step is ignored,
            since nothing follows that it could stop.
    """

    def __init__(self, *, evaluations_follow: bool) -> None:
        self._evaluations_follow = evaluations_follow

    def after_step(self, training: Training, report: StepReport) -> None:
        # An estimate for the next step, which must fit before a time limit.
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
