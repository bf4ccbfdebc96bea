"""The note that a slice of a run came further than its start."""

from __future__ import annotations

from megatron.train.loop import Hook, Training
from megatron.train.progress import Progress
from megatron.train.report import StepReport


class NoteFirstStep(Hook):
    """Notes the first step of a slice in `progress.json`, which counts the slices in a row that made none."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def after_step(self, training: Training, report: StepReport) -> None:
        # Once a slice: any later step would only write the same again.
        if training.run.job.is_main and training.iteration == training.start + 1:
            self._progress.moved()
