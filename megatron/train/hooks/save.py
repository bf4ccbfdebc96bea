"""Save checkpoints during training, and report the end of those that are written in the background."""

from __future__ import annotations

from megatron.train.loop import Hook, Training, is_due
from megatron.train.report import StepReport
from megatron.train.saving import Saver


class CheckSave(Hook):
    """Reports the end of a background save; raises CheckpointError if it failed."""

    def __init__(self, saver: Saver) -> None:
        self._saver = saver

    def after_step(self, training: Training, report: StepReport) -> None:
        self._saver.check()


class Save(Hook):
    """Saves a checkpoint at --save-interval, at a request for one, and after the last iteration. Collective."""

    def __init__(self, saver: Saver) -> None:
        self._saver, self._tried_at = saver, -1  # iteration of the last save, failed or not

    def before_training(self, training: Training) -> None:
        self._tried_at = training.iteration

    def after_step(self, training: Training, report: StepReport) -> None:
        if is_due(training.iteration, training.run.config.checkpoint.save_interval) or training.request.save:
            with training.timer.paused():
                self._saver.save()
            training.stopping.saved()  # restarts the interval of --save-interval-mins
            self._tried_at = training.iteration

    def after_training(self, training: Training) -> None:
        if training.request.stop is None and self._tried_at != training.iteration:
            self._saver.save()
