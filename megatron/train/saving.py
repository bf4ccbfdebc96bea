"""Save checkpoints of a run, synchronously or in the background.

With --async-save, training stops only while the share of this rank is copied into host memory. A thread then writes the copy.
The threads of all ranks agree, over a separate process group, that everything is written, and the first rank commits.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

from megatron.checkpoint.agreement import DiskError, run_on_all_ranks, saving_axis
from megatron.checkpoint.layout import CheckpointError, directory_name
from megatron.checkpoint.save import delete_retired, retire_old_checkpoints, write_checkpoint
from megatron.checkpoint.save_plan import Assets, Planner, SavePlan, read_assets
from megatron.checkpoint.snapshot import Snapshot
from megatron.checkpoint.storage import Storage
from megatron.config.command_line.saved import to_json
from megatron.launch.phase import Description
from megatron.launch.watchdog import Watchdog
from megatron.train.run import Run
from megatron.train.save_directory import CheckpointsToReplace

POLL_SECONDS = 0.2  # interval at which a wait for the thread forwards its phase to the watchdog
MAX_DELETION_SECONDS = 5.0  # how long the end of a run waits for deletions; the next save continues them


class PendingSave:
    """A save in progress.

    Attributes:
        iteration: the iteration of the checkpoint.
        began: `time.monotonic()` at the start of the save.
        seconds: duration from the start until the checkpoint was on disk; None before that, and after an error.
        error: the exception that ended the save; None if there was none.
        reported: the user has been told how the save ended.
        watch: stores the phase that the thread reports.
        thread: the thread that writes; None for a synchronous save.
    """

    def __init__(self, iteration: int) -> None:
        self.iteration, self.began = iteration, time.monotonic()
        self.seconds: float | None = None
        self.error: BaseException | None = None
        self.reported = False
        self.watch = DeferredWatch()
        self.thread: threading.Thread | None = None


class DeferredWatch(Watchdog):
    """Stores the last phase that a thread reports, until the main thread, which alone is watched, forwards it."""

    def __init__(self) -> None:
        self._phase: tuple[Description, bool | None] = ("beginning", True)  # description, and `alone`; None if waiting
        self._forwarded: object = None

    def doing(self, what: Description, *, alone: bool = False) -> None:
        self._phase = (what, alone)

    def waiting(self, what: Description) -> None:
        self._phase = (what, None)

    def forward(self, watch: Watchdog, why: str) -> None:
        """Report the thread's phase as that of the main thread, unless it was reported before.

        Args:
            watch: the main thread's watchdog.
            why: what the main thread waits for.
        """
        phase = self._phase
        if phase is self._forwarded:
            return
        self._forwarded = phase
        what, alone = phase
        if alone is None:
            watch.waiting(f"{why}: {what}")
        else:
            watch.doing(f"{why}: {what}", alone=alone)


class Saver:
    """Writes checkpoints of a run into --save: synchronously, or in the background with --async-save.

    All ranks must create it, and call `save` and `finish`, at the same points.

    Args:
        run: the run.
        tokenizer_assets: returns the files of the tokenizer to save; called on the first rank.
        log: prints a line to the user.
        storage: writes, renames and deletes files.

    Attributes:
        seconds: duration of the longest save so far on this rank, from its start to a checkpoint on disk; 0.0 before the first.
        saved: iteration of the newest checkpoint that has been, or is being, saved; None before the first. Only `save` and
            `finish` change it, so it is the same on all ranks.
    """

    def __init__(self, run: Run, tokenizer_assets: Assets, log: Callable[[str], None], storage: Storage | None = None) -> None:
        checkpoint = run.config.checkpoint
        if checkpoint.save is None:
            raise ValueError("there is no --save to save to")
        self._run, self._log, self._storage = run, log, storage or Storage()
        self._checkpoint, self._root = checkpoint, Path(checkpoint.save)
        # A separate process group: collectives of a thread must not be mixed with those of the training step.
        self._axis = saving_axis(run.mesh.world)
        self._assets = run_on_all_ranks(self._axis, lambda: read_assets(tokenizer_assets) if self._axis.first else {})
        self._overwritten = CheckpointsToReplace(self._root) if checkpoint.overwrite and self._axis.first else None
        self._planner = Planner(self._axis, Snapshot(run.job.device) if checkpoint.async_save else None)
        self._saving: PendingSave | None = None
        self._committed: int | None = None
        self._deletion: threading.Thread | None = None
        self.seconds = 0.0
        self.saved: int | None = None

    def save(self) -> None:
        """Save a checkpoint of the current state. Collective. If the previous save is still in progress, wait for it first.

        Return when the checkpoint is on disk, or with --async-save when the copy in host memory has been made.

        Raises:
            CheckpointError: this checkpoint, or the previous one, could not be written. With --on-save-error continue, a disk
                error is reported to the user instead.
        """
        self._finish_pending()  # this save overwrites the host memory that the previous one writes from
        run, saving = self._run, PendingSave(self._run.state.iteration)
        run.job.watch.doing("collecting a checkpoint")
        self._log(f"saving checkpoint at iteration {saving.iteration:7d} to {self._root}")
        parts = run.parts(optimizer=not self._checkpoint.no_save_optim)
        try:
            plan = self._planner.plan(saving.iteration, parts, to_json(run.config), self._assets)
        except CheckpointError as error:
            directory = self._root / directory_name(saving.iteration)
            raise type(error)(f"{directory}: could not be saved: {error}") from error
        self._saving, self.saved = saving, saving.iteration
        if self._checkpoint.async_save:
            arguments = (plan, saving, saving.watch)  # a thread releases its arguments when it ends
            saving.thread = threading.Thread(target=self._write, args=arguments, name="checkpoint", daemon=True)
            saving.thread.start()
        else:
            self._write(plan, saving, run.job.watch)
            self._finish_pending()
        run.job.watch.idle()

    def check(self) -> None:
        """Report the end of a background save, if it has ended. Without communication, so ranks may report at different steps.

        Raises:
            CheckpointError: the save failed; see `save`.
            RuntimeError: communication failed, because another rank is lost.
        """
        if self._saving is not None:
            self._report(self._saving)

    def finish(self) -> None:
        """Wait until every save is on disk, and a limited time for deletions. Collective. Raises the errors of `save`."""
        self._finish_pending()
        if self._deletion is not None:
            self._run.job.watch.doing("deleting old checkpoints", alone=True)
            self._deletion.join(MAX_DELETION_SECONDS)
        self._run.job.watch.idle()

    def _write(self, plan: SavePlan, saving: PendingSave, watch: Watchdog) -> None:
        """Write and commit a checkpoint. Runs in the background thread, or in the main thread for a synchronous save."""
        try:
            write_checkpoint(self._root, plan, self._axis, self._storage, watch)
            saving.seconds = time.monotonic() - saving.began
            if self._axis.first:
                self._delete_old(saving.iteration)
        except BaseException as error:  # `_report` raises it in the main thread
            saving.error = error

    def _delete_old(self, newest: int) -> None:
        """Delete old checkpoints in a thread, on the first rank. Neither the other ranks nor the next step wait for it."""
        checkpoint = self._checkpoint
        try:
            if self._overwritten is not None:
                self._overwritten.put_aside(self._storage)
            # Renamed first, deleted later, so that a directory named like a checkpoint is always a complete one.
            retired = retire_old_checkpoints(self._root, newest, checkpoint.keep_last, checkpoint.keep_every, self._storage)
        except OSError as error:
            logging.getLogger(__name__).warning("%s: old checkpoints could not be deleted: %s", self._root, error.strerror)
            return
        # If an earlier deletion is still running, these keep their new names until the next save deletes them.
        if retired and (self._deletion is None or not self._deletion.is_alive()):
            self._deletion = threading.Thread(
                target=delete_retired, args=(retired, self._storage), name="deletion", daemon=True
            )
            self._deletion.start()

    def _finish_pending(self) -> None:
        """Wait for the save in progress, and report how it ended, or raise its error."""
        saving = self._saving
        if saving is None:
            return
        while saving.thread is not None and saving.thread.is_alive():
            saving.watch.forward(self._run.job.watch, f"waiting for the checkpoint of iteration {saving.iteration}")
            saving.thread.join(POLL_SECONDS)
        self._saving = None
        if saving.seconds is not None:
            self._committed = saving.iteration
        # After a failed save, this is the previous checkpoint.
        self.saved = self._committed
        self._report(saving)

    def _report(self, saving: PendingSave) -> None:
        """Log once that a save has ended, or raise its error, unless --on-save-error is continue."""
        error = saving.error
        if error is not None and not (isinstance(error, DiskError) and self._checkpoint.on_save_error == "continue"):
            raise error
        if saving.reported:
            return
        if error is not None:
            saving.reported = True
            self._log(f"{error}. Training continues without this checkpoint because of --on-save-error continue")
        elif saving.seconds is not None:
            saving.reported = True
            self.seconds = max(self.seconds, saving.seconds)
            self._log(f"  successfully saved checkpoint at iteration {saving.iteration:7d} to {self._root}")
