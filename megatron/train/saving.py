"""Save checkpoints of a run, synchronously or in the background.

With --async-save the step stops only for as long as it takes to copy this rank's share into host memory. A thread then
writes the copy, agrees with those of the other ranks over a process group that nothing else uses, and the first commits.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

from megatron.checkpoint.agreement import DiskError, saving_axis, together
from megatron.checkpoint.content import Assets, Content, Contents, read_assets
from megatron.checkpoint.layout import CheckpointError, directory_name
from megatron.checkpoint.save import delete, set_aside, write
from megatron.checkpoint.snapshot import Snapshot
from megatron.checkpoint.storage import Storage
from megatron.config.command_line.saved import to_json
from megatron.launch.phase import Description
from megatron.launch.watchdog import Watchdog
from megatron.train.run import Run
from megatron.train.save_directory import CheckpointsToReplace

POLL = 0.2  # seconds between two looks at what the thread says, while waiting for it
DELETION = 5.0  # seconds that the end of a run waits for a deletion; what is left goes at the next save


class PendingSave:
    """One save under way.

    Attributes:
        iteration: of the checkpoint.
        began: its begin, `time.monotonic()`.
        seconds: from its begin until it was on disk; None before.
        error: the exception that ended it.
        told: its end has been reported.
        relay: the phases that its thread reports.
        thread: the thread that it runs in; None in the foreground.
    """

    def __init__(self, iteration: int) -> None:
        self.iteration, self.began = iteration, time.monotonic()
        self.seconds: float | None = None
        self.error: BaseException | None = None
        self.told = False
        self.relay = DeferredWatch()
        self.thread: threading.Thread | None = None


class DeferredWatch(Watchdog):
    """Keeps the phases that a thread reports until the main thread waits for it: a watchdog judges main threads alone."""

    def __init__(self) -> None:
        self._said: tuple[Description, bool | None] = ("beginning", True)  # None: it waits for others
        self._passed: object = None

    def doing(self, what: Description, *, alone: bool = False) -> None:
        self._said = (what, alone)

    def waiting(self, what: Description) -> None:
        self._said = (what, None)

    def pass_on(self, watch: Watchdog, why: str) -> None:
        """Report the thread's phase as the main thread's own, unless it was reported already.

        Args:
            watch: the main thread's watchdog.
            why: what the main thread waits for.
        """
        said = self._said
        if said is self._passed:
            return
        self._passed = said
        what, alone = said
        if alone is None:
            watch.waiting(f"{why}: {what}")
        else:
            watch.doing(f"{why}: {what}", alone=alone)


class Saver:
    """Writes checkpoints of a run into --save: at once, or in the background with --async-save.

    All ranks make it, and call `save` and `finish`, at the same points.

    Args:
        run: the run.
        tokenizer_assets: the tokenizer's files; the first rank's count.
        tell: prints a line to the user.
        storage: the disk.

    Attributes:
        seconds: the longest a whole save took so far on this rank, from its begin until it was on disk; 0.0 before the first.
        saved: iteration of the newest checkpoint that is, or is being, saved; None before the first. It changes in `save`
            and `finish` alone, so it is the same on all ranks.
    """

    def __init__(self, run: Run, tokenizer_assets: Assets, tell: Callable[[str], None], storage: Storage | None = None) -> None:
        checkpoint = run.config.checkpoint
        if checkpoint.save is None:
            raise ValueError("there is no --save to save to")
        self._run, self._tell, self._storage = run, tell, storage or Storage()
        self._checkpoint, self._root = checkpoint, Path(checkpoint.save)
        # A process group of its own: collectives of a thread must not mix with those of the training step.
        self._axis = saving_axis(run.mesh.world)
        self._assets = together(self._axis, lambda: read_assets(tokenizer_assets) if self._axis.first else {})
        self._overwritten = CheckpointsToReplace(self._root) if checkpoint.overwrite and self._axis.first else None
        self._contents = Contents(self._axis, Snapshot(run.job.device) if checkpoint.async_save else None)
        self._saving: PendingSave | None = None
        self._committed: int | None = None
        self._deletion: threading.Thread | None = None
        self.seconds = 0.0
        self.saved: int | None = None

    def save(self) -> None:
        """Save a checkpoint of the state as it is now. Collective. Waits for the save before.

        Returns when it is on disk, or with --async-save when the copy is made.

        Raises:
            CheckpointError: it could not be written, or the one before. With --on-save-error continue a failure of the disk
                is reported instead, and there is no checkpoint.
        """
        self._settle()  # its copy in host memory is about to be overwritten
        run, saving = self._run, PendingSave(self._run.state.iteration)
        run.job.watch.doing("collecting a checkpoint")
        self._tell(f"saving checkpoint at iteration {saving.iteration:7d} to {self._root}")
        parts = run.parts(optimizer=not self._checkpoint.no_save_optim)
        try:
            content = self._contents.take(saving.iteration, parts, to_json(run.config), self._assets)
        except CheckpointError as error:
            where = self._root / directory_name(saving.iteration)
            raise type(error)(f"{where}: could not be saved: {error}") from error
        self._saving, self.saved = saving, saving.iteration
        if self._checkpoint.async_save:
            arguments = (content, saving, saving.relay)  # a thread lets go of them at its end
            saving.thread = threading.Thread(target=self._write, args=arguments, name="checkpoint", daemon=True)
            saving.thread.start()
        else:
            self._write(content, saving, run.job.watch)
            self._settle()
        run.job.watch.idle()

    def check(self) -> None:
        """Report what the thread has done meanwhile. No communication, so ranks can see it at different steps.

        Raises:
            CheckpointError: as `save`.
            RuntimeError: communication failed, because another rank is lost.
        """
        if self._saving is not None:
            self._report(self._saving)

    def finish(self) -> None:
        """Wait until everything is on disk. Collective. Errors as `save`."""
        self._settle()
        if self._deletion is not None:
            self._run.job.watch.doing("deleting old checkpoints", alone=True)
            self._deletion.join(DELETION)
        self._run.job.watch.idle()

    def _write(self, content: Content, saving: PendingSave, watch: Watchdog) -> None:
        """Write and commit, in the thread or in its place."""
        try:
            write(self._root, content, self._axis, self._storage, watch)
            saving.seconds = time.monotonic() - saving.began
            if self._axis.first:
                self._tidy(saving.iteration)
        except BaseException as error:  # raised by `_report` in the main thread
            saving.error = error

    def _tidy(self, newest: int) -> None:
        """Delete old checkpoints, on the first rank. Nobody waits for that, neither another rank nor the next step."""
        keep = self._checkpoint
        try:
            if self._overwritten is not None:
                self._overwritten.put_aside(self._storage)
            # Renamed at once, deleted later: a directory with its own name is always a whole checkpoint.
            aside = set_aside(self._root, newest, keep.keep_last, keep.keep_every, self._storage)
        except OSError as error:
            logging.getLogger(__name__).warning("%s: nothing could be deleted: %s", self._root, error.strerror)
            return
        # While the last ones are still being deleted these wait, aside, for the next time.
        if aside and (self._deletion is None or not self._deletion.is_alive()):
            self._deletion = threading.Thread(target=delete, args=(aside, self._storage), name="deletion", daemon=True)
            self._deletion.start()

    def _settle(self) -> None:
        """Wait for the save under way, tell or raise how it ended, and forget it."""
        saving = self._saving
        if saving is None:
            return
        while saving.thread is not None and saving.thread.is_alive():
            saving.relay.pass_on(self._run.job.watch, f"waiting for the checkpoint of iteration {saving.iteration}")
            saving.thread.join(POLL)
        self._saving = None
        if saving.seconds is not None:
            self._committed = saving.iteration
        # A save that failed is none: back to the one before.
        self.saved = self._committed
        self._report(saving)

    def _report(self, saving: PendingSave) -> None:
        error = saving.error
        if error is not None and not (isinstance(error, DiskError) and self._checkpoint.on_save_error == "continue"):
            raise error
        if saving.told:
            return
        if error is not None:
            saving.told = True
            self._tell(f"{error}. Training goes on without this checkpoint, as --on-save-error continue says")
        elif saving.seconds is not None:
            saving.told = True
            self.seconds = max(self.seconds, saving.seconds)
            self._tell(f"  successfully saved checkpoint at iteration {saving.iteration:7d} to {self._root}")
