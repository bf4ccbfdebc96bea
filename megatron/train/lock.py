"""Lock of a --save directory, so that one run at a time saves there: a file `.lock`, held by the first rank. Imports no torch.

The file names the processes of the run, and the first rank touches it every few seconds. A new run on the same host looks the
processes up in the process table; on another host it watches for touches. So a lock outlives its run by at most a minute, and
the file system need not support locks. The file is created by a link, or with O_EXCL, both of which are atomic on file servers
too. Where flock works, it also keeps two starting runs from examining a dead run's lock at the same moment.

When one rank of a run is killed, the other ranks end within half a minute. A run that starts meanwhile waits for them.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron.launch.environment import LaunchEnvironment
from megatron.launch.errors import InputError
from megatron.launch.exit_report import write_error_file, write_stderr
from megatron.launch.heartbeat import Process

if TYPE_CHECKING:
    from megatron.launch.job import Guard

LOCK_FILE = ".lock"
MAX_BYTES = 1 << 24  # size limit of the lock file: room for a hundred thousand processes
TOUCH_SECONDS = 5.0  # time between two touches
# A run on another host, whose processes cannot be looked up, counts as dead after so long without a touch.
STALE_SECONDS = 45.0
POLL_SECONDS = 0.5  # time between two readings of another run's lock


@dataclass(frozen=True)
class LockHolder:
    """The run that holds a lock, as the lock file describes it.

    Attributes:
        since: local date and time of the start, `2026-01-31 12:00:00`.
        ranks: the processes of the run, rank 0 first.
        launcher: torchrun's process, whose end ends the ranks; None under another launcher.
    """

    since: str
    ranks: tuple[Process, ...]
    launcher: Process | None = None

    @classmethod
    def from_text(cls, text: str) -> LockHolder | None:
        """Parse the text of a lock file; return None for a text that no run writes."""
        try:
            values = json.loads(text)
            launcher = None if values["launcher"] is None else Process(**values["launcher"])
            holder = cls(str(values["since"]), tuple(Process(**process) for process in values["ranks"]), launcher)
        except (ValueError, KeyError, TypeError):
            return None
        return holder if holder.ranks else None

    def to_text(self) -> str:
        """Return the content of the lock file."""
        return json.dumps(asdict(self)) + "\n"

    def __str__(self) -> str:
        return f"process {self.ranks[0].pid} on host {self.ranks[0].host}, since {self.since}"


@dataclass(frozen=True)
class LockReading:
    """State of a lock file at one moment.

    Attributes:
        text: content of the file.
        touched: time of the last touch by the disk's clock, in nanoseconds.
        age: seconds since the last touch; ignored when two readings are compared.
    """

    text: str
    touched: int
    age: float = field(compare=False)

    @property
    def holder(self) -> LockHolder | None:
        """The run that holds the lock; None when the file cannot be parsed."""
        return LockHolder.from_text(self.text)

    def __str__(self) -> str:
        return str(self.holder or f"which left no name, {self.age:.0f} s ago")

    def state(self, own: Process) -> str:
        """Return the state of the run that holds the lock.

        `gone`: it has ended. `dying`: a process of it has ended, so the others will. `alive`: none has. `silent`: its processes
        cannot be looked up from here, so only a further touch will show that it lives.
        """
        holder = self.holder
        # The file names no process, for instance because a full disk cut it off.
        if holder is None:
            return "gone" if self.age > STALE_SECONDS else "silent"
        launcher = () if holder.launcher is None else (holder.launcher,)
        first, *others = (process.state(own) for process in holder.ranks)
        # This process is left out: it may have got the process id of a dead rank, which would then seem alive.
        living = [process for process in holder.ranks if process != own and process.state(own) in ("alive", "stopped")]
        if first == "unknown":  # rank 0 is on another host
            return ("dying" if living else "gone") if self.age > STALE_SECONDS else "silent"
        if not living and ("unknown" not in others or self.age > STALE_SECONDS):
            return "gone"
        died = "gone" in (first, *others, *(process.state(own) for process in launcher))
        return "dying" if died or not living else "alive"


class Lock:
    """The lock of a directory, held by this process and touched by a background thread. Created by `acquire`.

    Args:
        root: the directory.
        holder: this run, as the lock file describes it.
        on_lost: called with a message when another run has taken the lock over. By default it ends the process, since both
            runs would overwrite each other's checkpoints.
        created: the directory was created for the lock, so `release` removes it when it is still empty.
    """

    def __init__(
        self, root: Path, holder: LockHolder, on_lost: Callable[[str], object] | None = None, *, created: bool = False
    ) -> None:
        self.root, self.holder, self._created = root, holder, created
        self._path, self._on_lost = root / LOCK_FILE, on_lost or _exit_with_error
        self._released, self._file_changes = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._touch, name="lock", daemon=True)
        self._thread.start()

    def set_processes(self, ranks: Sequence[Process]) -> None:
        """Write all processes of the run into the file, so that the next run waits until each has ended."""
        with self._file_changes, suppress(OSError):
            self.holder = replace(self.holder, ranks=tuple(ranks))
            # A rename is atomic: a concurrent reader sees the old text or the new one.
            with _temporary_file(self._path, self.holder.to_text()) as fresh:
                os.replace(fresh, self._path)

    def release(self) -> None:
        """Remove the file, and the directory if it was created for the lock and nothing else is in it."""
        self._released.set()
        self._thread.join()  # a running thread would create the file again
        with suppress(OSError):
            if self._is_own((_read(self._path) or (None,))[0]):
                self._path.unlink()
                if self._created:
                    self.root.rmdir()

    def _is_own(self, text: str | None) -> bool:
        """Return whether the text of a lock file names this run."""
        holder = None if text is None else LockHolder.from_text(text)
        return holder is not None and holder.ranks[0] == self.holder.ranks[0]

    def _touch(self) -> None:
        """Touch the file regularly until the lock is released; the thread's work."""
        while not self._released.wait(TOUCH_SECONDS):
            with self._file_changes, suppress(OSError):
                text, _ = _read(self._path) or (None, 0)
                if self._is_own(text):
                    os.utime(self._path)
                elif text is not None:
                    other = LockHolder.from_text(text) or "another run"
                    self._on_lost(
                        f"error: --save {self.root} was taken over by {other}: this run gave no sign for {STALE_SECONDS:.0f} s"
                    )
                elif self.root.is_dir():  # somebody has deleted the file, but the directory is still this run's
                    _create(self._path, self.holder)


def _exit_with_error(text: str) -> None:
    write_stderr(f"{text}\n")
    write_error_file(text)
    os._exit(1)


def acquire(root: Path, holder: LockHolder, log: Callable[[str], object], patience: float = STALE_SECONDS) -> Lock | None:
    """Acquire the lock of a directory, which is created if need be. Waits for another run that is ending.

    Args:
        root: the directory that the run saves to.
        holder: this run. Its first process is the calling one.
        log: called with a line that says what `acquire` waits for.
        patience: seconds to wait for a run that is ending.

    Returns:
        The lock; None, with a warning, when no file can be written there.

    Raises:
        InputError: another run keeps the lock, or the directory cannot be created.
    """
    wait, own, created = _Wait(root, log, patience), holder.ranks[0], not os.path.exists(root)
    while True:
        try:
            root.mkdir(parents=True, exist_ok=True)
            with _flock(root):  # of two runs that find a dead run's lock, one could remove the new lock of the other
                seen = read_lock(root / LOCK_FILE)
                state = "gone" if seen is None or wait.is_over(seen, own) else seen.state(own)
                free = state == "gone" and (seen is None or _remove_dead_lock(root / LOCK_FILE, seen))
                if free and _create(root / LOCK_FILE, holder):
                    return Lock(root, holder, created=created)
        except OSError as error:
            if not os.path.isdir(root):  # no checkpoint could be written either
                raise InputError(f"--save {root}: cannot be made: {error.strerror}; choose another place") from error
            logging.getLogger(__name__).warning("%s: no lock can be kept here: %s", root / LOCK_FILE, error.strerror)
            return None
        if seen is not None and state != "gone":  # otherwise another run has created its lock first: read that one at once
            wait.continue_or_raise(seen, state)
            time.sleep(POLL_SECONDS)


class _Wait:
    """Wait of a starting run for the end of the run before it; the arguments are those of `acquire`."""

    def __init__(self, root: Path, log: Callable[[str], object], patience: float) -> None:
        self._root, self._log, self._patience = root, log, patience
        self._began = self._since = time.monotonic()  # _since: time of the first reading of the present lock
        self._first: LockReading | None = None
        self._logged = ""

    def is_over(self, seen: LockReading, own: Process) -> bool:
        """Return whether the lock of a `silent` run has not been touched for STALE_SECONDS since it was first read.

        The time since the first reading counts, not the age of the touch: after a clock was set back that is never old.
        """
        return self._first == seen and time.monotonic() - self._since > STALE_SECONDS and seen.state(own) == "silent"

    def continue_or_raise(self, seen: LockReading, state: str) -> None:
        """Log what is waited for. Raise InputError if the other run is alive, or the time for it to end is over."""
        now = time.monotonic()
        if self._first is None or self._first.text != seen.text:
            self._first, self._since = seen, now
        touched = state == "silent" and seen.touched != self._first.touched
        limit = self._patience if state == "dying" else STALE_SECONDS + 2 * TOUCH_SECONDS
        if state == "alive" or touched or now - self._began > limit:
            ways = f"wait for its end, end it, or give another --save (the lock is {self._root / LOCK_FILE})"
            raise InputError(f"--save {self._root} is in use by another run, {seen}; {ways}")
        why = "is ending" if state == "dying" else "gives no sign of life so far"
        line = f"waiting for up to {limit:.0f} s: a run before this one in {self._root}, {seen}, {why}"
        if line != self._logged:
            self._log(line)
            self._logged = line


def read_lock(path: Path) -> LockReading | None:
    """Read a lock file; return None when there is none.

    Raises:
        OSError: the file cannot be read, or no file can be written beside it.
    """
    if (read := _read(path)) is None:
        return None
    text, touched = read
    with _temporary_file(path, "") as fresh:  # its time is that of the disk's clock, which may differ from this host's
        return LockReading(text, touched, (os.stat(fresh).st_mtime_ns - touched) / 1e9)


def _read(path: Path) -> tuple[str, int] | None:
    """Return the text of a lock file and the time of its last touch in nanoseconds; None when there is no file."""
    # Opened for each reading, since NFS asks the server for the current state only on open (close-to-open consistency).
    try:  # O_NONBLOCK, so that a pipe of this name does not block
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    with open(descriptor, "rb") as file:
        return file.read(MAX_BYTES).decode("utf-8", errors="replace"), os.fstat(descriptor).st_mtime_ns


@contextmanager
def _temporary_file(path: Path, text: str) -> Iterator[Path]:
    """Write a file of this process beside `path`, touched now by the disk's clock; remove it at the end of the block."""
    fresh = path.with_name(f"{path.name}.{os.uname().nodename}.{os.getpid()}.{threading.get_ident()}")
    fresh.unlink(missing_ok=True)
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        os.utime(fresh)
        yield fresh
    finally:
        fresh.unlink(missing_ok=True)


def _create(path: Path, holder: LockHolder) -> bool:
    """Create the lock file with its whole text, atomically; return False if another run has created it first."""
    with _temporary_file(path, holder.to_text()) as fresh:
        try:
            os.link(fresh, path)
        except FileExistsError:
            return False
        except OSError:  # the file system has no hard links
            try:
                descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            except FileExistsError:
                return False
            with open(descriptor, "w", encoding="utf-8") as file:
                file.write(holder.to_text())
    return True


def _remove_dead_lock(path: Path, dead: LockReading) -> bool:
    """Remove the lock of a dead run; leave it and return False if another run has replaced it meanwhile."""
    aside = path.with_name(f"{path.name}.dead.{os.uname().nodename}.{os.getpid()}")
    try:
        os.rename(path, aside)
    except FileNotFoundError:
        return True
    # If another run put its own lock there between the reading and the rename, that one is put back.
    same = (_read(aside) or ("",))[0] == dead.text
    if not same:
        with suppress(FileExistsError):
            os.link(aside, path)
    aside.unlink()
    return same


def acquire_for_run(save: str, launched: bool, log: Callable[[str], object]) -> Lock | None:
    """Acquire the lock of --save for the run of this process; see `acquire`.

    Args:
        save: the directory.
        launched: torchrun is this process's parent, and its end ends the ranks.
        log: called with a line that says what `acquire` waits for.
    """
    launcher = Process.here(os.getppid()) if launched else None
    return acquire(Path(save), LockHolder(time.strftime("%Y-%m-%d %H:%M:%S"), (Process.own(),), launcher), log)


@contextmanager
def hold_lock(
    save: str | None, guard: Guard, env: LaunchEnvironment, log: Callable[[str], object]
) -> Iterator[Callable[[], None]]:
    """Hold the lock of --save inside the block. Called by all ranks; the first one holds the lock.

    Args:
        save: the directory; None locks nothing.
        guard: connects the ranks before the process group forms.
        env: the launcher's description of this process.
        log: called with a line that says what the lock waits for.

    Yields:
        A function to call when all ranks have joined; it writes their processes into the lock file.

    Raises:
        InputError: on all ranks, when another run holds the lock.
    """
    if save is None:
        yield lambda: None
        return
    held: list[Lock] = []

    def acquire_on_rank_0() -> str | None:
        try:
            held.extend(lock for lock in [acquire_for_run(save, env.launcher == "torchrun", log)] if lock is not None)
        except InputError as error:
            return str(error)
        return None

    def record_ranks() -> None:
        ranks = guard.processes(Process.own(), env.rank)
        for lock in held:
            lock.set_processes(ranks or [])
            guard.watch.at_end = lock.release

    if (problem := guard.ask_rank_0(env.rank, f"taking the lock of {save}", acquire_on_rank_0)) is not None:
        raise InputError(problem)
    try:
        yield record_ranks
    finally:
        for lock in held:
            lock.release()


@contextmanager
def _flock(root: Path) -> Iterator[None]:
    """Hold an flock of the directory inside the block, if the file system has it and it is free within a second."""
    descriptor = os.open(root, os.O_RDONLY)
    try:
        for _ in range(20):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.05)
            except OSError:
                break  # the file system has no flock
        yield
    finally:
        os.close(descriptor)
