"""Record that a slice of a run (see `progress.py`) has made its first step."""

from __future__ import annotations

from megatron.train.loop import Hook, Training
from megatron.train.progress import Progress
from megatron.train.report import StepReport


class NoteFirstStep(Hook):
    """Resets the count of slices without a step, in `progress.json`, after the first step of this slice."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def after_step(self, training: Training, report: StepReport) -> None:
        # Only after the first step, since the count stays 0 from then on.
        if training.run.job.is_main and training.iteration == training.start + 1:
            self._progress.note_first_step()
