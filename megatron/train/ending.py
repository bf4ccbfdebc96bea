"""End a run, or this slice of it: at its last iteration, or on request with a checkpoint to go on from."""

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
    """End of training as an exit status. STOPPED is on request: start again to go on from the checkpoint."""

    FINISHED = 0
    STOPPED = 75


class Ending:
    """Ends a slice of a run.

    Args:
        training: the run.
        saver: writes checkpoints; None without --save.
        progress: the file of the run's slices.
        skips: the slice's steps without an update.
        again: what to say of how the run goes on.
        warning: what is said once more when the run is finished.
    """

    def __init__(
        self,
        training: Training,
        saver: Saver | None,
        progress: Progress,
        skips: SkipCounter,
        *,
        again: str,
        warning: str | None = None,
    ) -> None:
        self._training, self._saver, self._progress = training, saver, progress
        self._skips, self._again, self._warning = skips, again, warning

    def stop(self, request: Request) -> Exit:
        """End the slice with one whole checkpoint, and say why. Collective.

        Without a checkpoint training has nothing to go on from, so the stop is the end. An evaluation can be made again.

        Raises:
            TrainingError: there is no checkpoint to go on from, or no slice comes any further.
        """
        training, why = self._training, request.stop or "a request"
        self._log_skips()
        if self._saver is not None:
            self._save_stopped(self._saver, why)
        training.stopping.acknowledge()
        where, evaluates = f"stopping after iteration {training.iteration}", training.loader is None
        if self._saver is None and request.outside and not evaluates:
            raise TrainingError(f"{where}: {why}; nothing is saved, because there is no --save")
        goes_on = self._saver is not None or evaluates
        if not goes_on and (wrong := learning_failure(training.run.state)) is not None:
            raise TrainingError(f"{where}: {why}; {wrong}")
        text = f"{where}: {why}; {self._kept()}"
        training.log(text)
        if self._saver is not None:
            write_error_file(text)
        return Exit.STOPPED if goes_on else Exit.FINISHED

    def finish(self) -> Exit:
        """End the run, which remembers that. Collective.

        Raises:
            TrainingError: its last steps were all skipped, or the last checkpoint could not be saved.
        """
        training = self._training
        if training.loader is not None:
            if self._saver is not None and training.iteration > training.start:
                self._save_last(self._saver)
            self._log_skips()
            if (wrong := learning_failure(training.run.state)) is not None:
                raise TrainingError(wrong)
            # After the last evaluations, so that a run which was killed in them is started again for them.
            if self._saver is not None:
                self._note(finished=training.iteration)
        training.stopping.acknowledge()  # a request that came too late to be one
        if self._warning is not None:
            training.log(self._warning)
        return Exit.FINISHED

    def settle(self) -> None:
        """Wait for a save under way, after a failure: it is what to go on from. Collective."""
        if self._saver is not None:
            with suppress(CheckpointError):  # the failure that brought us here is the one to tell
                self._saver.finish()

    def _save_stopped(self, saver: Saver, why: str) -> None:
        """Save what there is to save, and note how the slice ended. TrainingError where no slice comes any further."""
        if self._training.iteration > self._training.start:
            self._save_last(saver)
            self._note(stopped=True)
            return
        idle, wrong = self._progress.idle + 1, self._progress.too_short(why)
        self._note(idle=idle, stopped=wrong is None)
        if wrong is not None:
            raise TrainingError(wrong)

    def _save_last(self, saver: Saver) -> None:
        """Have the state as it is now in a whole checkpoint on the disk, whatever that takes. Collective.

        TrainingError where it cannot be written, also with --on-save-error continue: nothing comes after it.
        """
        iteration = self._training.iteration
        saver.finish()  # one under way may be this very checkpoint
        if saver.saved != iteration:
            saver.save()
            saver.finish()
        if saver.saved != iteration:
            save = self._training.run.config.checkpoint.save
            raise TrainingError(
                f"the last checkpoint, of iteration {iteration}, could not be saved to {save}, as was said "
                "above; make room there and start again with --auto-resume, from the newest one that is whole"
            )

    def _kept(self) -> str:
        """Return what a stop keeps and how the run goes on, in words."""
        training = self._training
        if training.loader is None:
            kept = "the evaluation is not finished"
        elif self._saver is None:
            return "there is no --save, so nothing is kept"
        else:
            kept = "checkpoint saved" if training.iteration > training.start else "nothing new to save"
        return f"{kept}; {self._again if self._saver is not None else 'start again to go on'}"

    def _note(self, *, finished: int | None = None, idle: int = 0, stopped: bool = False) -> None:
        """Note on the first rank how this slice ended."""
        if self._training.run.job.is_main:
            self._progress.write(finished=finished, idle=idle, stopped=stopped)

    def _log_skips(self) -> None:
        """Log how many steps were skipped."""
        if (text := self._skips.summary(self._training.run.state)) is not None:
            self._training.log(text)
