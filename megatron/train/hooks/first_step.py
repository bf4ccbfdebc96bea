"""Record that a slice of a run has made a step."""

from __future__ import annotations

from megatron.train.loop import Hook, Training
from megatron.train.progress import Progress
from megatron.train.report import StepReport


class NoteFirstStep(Hook):
    """Records the first step of a slice in `progress.json`, which counts the slices in a row without a step."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def after_step(self, training: Training, report: StepReport) -> None:
        # Only after the first step, since later ones would write the same again.
        if training.run.job.is_main and training.iteration == training.start + 1:
            self._progress.note_first_step()
