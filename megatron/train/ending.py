"""End a run at its last iteration, or one slice of it on request, with a checkpoint to resume from.

A slice is one of the processes in turn that train a run; see `progress.py`.
"""

from __future__ import annotations

from contextlib import suppress
from enum import IntEnum

from megatron.checkpoint.layout import CheckpointError
from megatron.launch.exit_report import write_error_file
from megatron.train.errors import TrainingError
from megatron.train.loop import Training
from megatron.train.progress import Progress
from megatron.train.saving import Saver
from megatron.train.skips import SkipCounter, learning_failure
from megatron.train.stopping import Request


class Exit(IntEnum):
    """Exit status of a training program. STOPPED: stopped on request; the next start resumes from the checkpoint."""

    FINISHED = 0
    STOPPED = 75


class Ending:
    """Ends a slice of a run.

    Args:
        training: the state of the training loop.
        saver: writes checkpoints; None without --save.
        progress: the record of the run's slices.
        skips: counts the slice's steps without an update.
        resume_advice: how to resume the run, for the last line.
        warning: a warning to repeat when the run is finished.
    """

    def __init__(
        self,
        training: Training,
        saver: Saver | None,
        progress: Progress,
        skips: SkipCounter,
        *,
        resume_advice: str,
        warning: str | None = None,
    ) -> None:
        self._training, self._saver, self._progress = training, saver, progress
        self._skips, self._resume_advice, self._warning = skips, resume_advice, warning

    def stop(self, request: Request) -> Exit:
        """End the slice with a complete checkpoint, and log the reason. Collective.

        Args:
            request: the agreement to stop.

        Returns:
            STOPPED if a new start resumes the run or repeats the evaluation; FINISHED for a training run without --save, which
            cannot be resumed.

        Raises:
            TrainingError: a request from outside stopped a training run without --save; the last checkpoint could not be
                saved; two slices in a row made no step; or the last steps of a run without --save were all skipped.
        """
        training, why = self._training, request.stop or "a request"
        self._log_skips()
        if self._saver is not None:
            self._save_stopped(self._saver, why)
        training.stopping.acknowledge()
        stopping, is_evaluation = f"stopping after iteration {training.iteration}", training.loader is None
        if self._saver is None and request.outside and not is_evaluation:
            raise TrainingError(f"{stopping}: {why}; nothing is saved, because there is no --save")
        can_resume = self._saver is not None or is_evaluation
        if not can_resume and (failure := learning_failure(training.run.state)) is not None:
            raise TrainingError(f"{stopping}: {why}; {failure}")
        text = f"{stopping}: {why}; {self._describe_saved()}"
        training.log(text)
        # torchrun reports a rank with status 75 as failed; with this text it names the reason.
        if self._saver is not None:
            write_error_file(text)
        return Exit.STOPPED if can_resume else Exit.FINISHED

    def finish(self) -> Exit:
        """Save the last checkpoint, and record in --save that the run is finished. Collective.

        Raises:
            TrainingError: the last steps were all skipped, or the last checkpoint could not be saved.
        """
        training = self._training
        if training.loader is not None:
            if self._saver is not None and training.iteration > training.start:
                self._save_last(self._saver)
            self._log_skips()
            if (failure := learning_failure(training.run.state)) is not None:
                raise TrainingError(failure)
            # Only after the final evaluations: a run that is killed during them is not finished, and repeats them on restart.
            if self._saver is not None:
                self._write_progress(finished=training.iteration)
        training.stopping.acknowledge()  # a request after the last step is too late to stop anything
        if self._warning is not None:
            training.log(self._warning)
        return Exit.FINISHED

    def finish_pending_save(self) -> None:
        """After a failure, wait for a save in progress, which may become the checkpoint to resume from. Collective."""
        if self._saver is not None:
            with suppress(CheckpointError):  # the earlier failure is the one to report
                self._saver.finish()

    def _save_stopped(self, saver: Saver, why: str) -> None:
        """Save a checkpoint if there was a step, and record how the slice ended. TrainingError after two slices without any."""
        if self._training.iteration > self._training.start:
            self._save_last(saver)
            self._write_progress(stopped=True)
            return
        idle, error = self._progress.idle + 1, self._progress.idle_error(why)
        self._write_progress(idle=idle, stopped=error is None)
        if error is not None:
            raise TrainingError(error)

    def _save_last(self, saver: Saver) -> None:
        """Ensure that a complete checkpoint of the current state is on disk. Collective.

        Raise TrainingError if not, even with --on-save-error continue, since no later checkpoint will follow.
        """
        iteration = self._training.iteration
        saver.finish()  # the save in progress may be of this very iteration
        if saver.saved != iteration:
            saver.save()
            saver.finish()
        if saver.saved != iteration:
            save = self._training.run.config.checkpoint.save
            raise TrainingError(
                f"the last checkpoint, of iteration {iteration}, could not be saved to {save}, as reported "
                "above; make room there and start again with --auto-resume, from the newest complete checkpoint"
            )

    def _describe_saved(self) -> str:
        """Return a description of what was saved at a stop, and of how to resume."""
        training = self._training
        if training.loader is None:
            saved = "the evaluation is not finished"
        elif self._saver is None:
            return "there is no --save, so nothing is saved"
        else:
            saved = "checkpoint saved" if training.iteration > training.start else "nothing new to save"
        return f"{saved}; {self._resume_advice if self._saver is not None else 'start again to go on'}"

    def _write_progress(self, *, finished: int | None = None, idle: int = 0, stopped: bool = False) -> None:
        """Record on the first rank how this slice ended."""
        if self._training.run.job.is_main:
            self._progress.write(finished=finished, idle=idle, stopped=stopped)

    def _log_skips(self) -> None:
        """Log how many steps were skipped."""
        if (text := self._skips.summary(self._training.run.state)) is not None:
            self._training.log(text)
