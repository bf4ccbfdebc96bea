"""Lock a --save directory, so that only one run at a time saves there, by a file `.lock`. Imports no torch.

The first rank creates the file, which lists the processes of the run, and touches it every few seconds. A new run on the same
host looks the processes up in the process table; on another host it waits for a further touch. So a lock outlives its run by at
most a minute, and the file system need not support locks. The file is created by a hard link, or with O_EXCL, both of which are
atomic on file servers, too. Where flock works, it prevents two starting runs from examining a dead run's lock at the same time.

When one rank of a run is killed, the other ranks end within half a minute. A run that starts in this time waits for them.
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
# After this time without a touch, a run on another host, whose processes cannot be looked up, is considered dead.
STALE_SECONDS = 45.0
POLL_SECONDS = 0.5  # time between two readings of another run's lock


@dataclass(frozen=True)
class LockHolder:
    """The run that holds a lock, as the lock file describes it.

    Attributes:
        since: local date and time at which the run started, `2026-01-31 12:00:00`.
        ranks: the processes of the run, rank 0 first.
        launcher: the process of torchrun, which ends its ranks when it ends; None for other launchers.
    """

    since: str
    ranks: tuple[Process, ...]
    launcher: Process | None = None

    @classmethod
    def from_text(cls, text: str) -> LockHolder | None:
        """Parse the text of a lock file; return None if no run has written it."""
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
    """A lock file as it was read once.

    Attributes:
        text: content of the file.
        touched: time of the last touch in nanoseconds, by the clock of the file system.
        age: seconds from the last touch to the reading; ignored when two readings are compared.
    """

    text: str
    touched: int
    age: float = field(compare=False)

    @property
    def holder(self) -> LockHolder | None:
        """The run that holds the lock; None when the file cannot be parsed."""
        return LockHolder.from_text(self.text)

    def __str__(self) -> str:
        return str(self.holder or f"which has left an unreadable lock file, {self.age:.0f} s ago")

    def state(self, own: Process) -> str:
        """Return the state of the run that holds the lock, as it is seen from this process, `own`.

        `gone`: it has ended. `dying`: one of its processes has ended, so the others will end. `alive`: no process has ended.
        `silent`: its processes cannot be looked up from this host, so only a further touch will show that it is alive.
        """
        holder = self.holder
        # The file cannot be parsed, for instance because a full disk has truncated it.
        if holder is None:
            return "gone" if self.age > STALE_SECONDS else "silent"
        launcher = () if holder.launcher is None else (holder.launcher,)
        rank_0, *others = (process.state(own) for process in holder.ranks)
        # Without this process: it may have the process id of a dead rank, which would then seem alive.
        living = [process for process in holder.ranks if process != own and process.state(own) in ("alive", "stopped")]
        if rank_0 == "unknown":  # rank 0 was on another host
            return ("dying" if living else "gone") if self.age > STALE_SECONDS else "silent"
        if not living and ("unknown" not in others or self.age > STALE_SECONDS):
            return "gone"
        has_ended = "gone" in (rank_0, *others, *(process.state(own) for process in launcher))
        return "dying" if has_ended or not living else "alive"


class Lock:
    """The lock of a directory, which a background thread touches until `release`. Created by `acquire`.

    Args:
        root: the directory that is locked.
        holder: this run, as the lock file describes it.
        on_lost: called with a message when another run has taken over the lock. The default ends the process, since the two
            runs would overwrite each other's checkpoints.
        created: the directory was created for the lock, so `release` removes it if it is empty then.
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
        """Write all processes of the run into the file, so that the next run waits until all have ended."""
        with self._file_changes, suppress(OSError):
            self.holder = replace(self.holder, ranks=tuple(ranks))
            # A rename is atomic: a concurrent reader reads the old text or the new one.
            with _temporary_file(self._path, self.holder.to_text()) as temporary:
                os.replace(temporary, self._path)

    def release(self) -> None:
        """Remove the file, and the directory if it was created for the lock and contains nothing else."""
        self._released.set()
        self._thread.join()  # otherwise the thread would create the file again
        with suppress(OSError):
            if self._is_own((_read(self._path) or (None,))[0]):
                self._path.unlink()
                if self._created:
                    self.root.rmdir()

    def _is_own(self, text: str | None) -> bool:
        """Return whether a lock file with this text is the one of this run."""
        holder = None if text is None else LockHolder.from_text(text)
        return holder is not None and holder.ranks[0] == self.holder.ranks[0]

    def _touch(self) -> None:
        """Touch the file every TOUCH_SECONDS until the lock is released. Runs in the background thread."""
        while not self._released.wait(TOUCH_SECONDS):
            with self._file_changes, suppress(OSError):
                text, _ = _read(self._path) or (None, 0)
                if self._is_own(text):
                    os.utime(self._path)
                elif text is not None:
                    other = LockHolder.from_text(text) or "another run"
                    self._on_lost(
                        f"error: --save {self.root} was taken over by {other}: its lock was untouched for {STALE_SECONDS:.0f} s"
                    )
                elif self.root.is_dir():  # someone has deleted the file, but not the directory
                    _create(self._path, self.holder)


def _exit_with_error(text: str) -> None:
    write_stderr(f"{text}\n")
    write_error_file(text)
    os._exit(1)


def acquire(root: Path, holder: LockHolder, log: Callable[[str], object], patience: float = STALE_SECONDS) -> Lock | None:
    """Acquire the lock of a directory, and create the directory if it does not exist. Wait for another run that is ending.

    Args:
        root: the directory that the run saves to.
        holder: this run; its first process is the one that calls.
        log: called with a line about what `acquire` waits for.
        patience: how long to wait for a run that is ending, in seconds.

    Returns:
        The lock; None, with a warning, if no file can be written to the directory.

    Raises:
        InputError: another run has the lock, or the directory cannot be created.
    """
    wait, own, created = _Wait(root, log, patience), holder.ranks[0], not os.path.exists(root)
    while True:
        try:
            root.mkdir(parents=True, exist_ok=True)
            with _flock(root):  # otherwise, of two runs that find a dead lock, one could remove the new lock of the other
                found = read_lock(root / LOCK_FILE)
                state = "gone" if found is None or wait.is_over(found, own) else found.state(own)
                is_free = state == "gone" and (found is None or _remove_dead_lock(root / LOCK_FILE, found))
                if is_free and _create(root / LOCK_FILE, holder):
                    return Lock(root, holder, created=created)
        except OSError as error:
            if not os.path.isdir(root):  # so no checkpoint could be written either
                raise InputError(f"--save {root}: cannot be created: {error.strerror}; choose another directory") from error
            logging.getLogger(__name__).warning("%s: no lock can be created: %s", root / LOCK_FILE, error.strerror)
            return None
        if found is not None and state != "gone":  # otherwise another run has just created its lock: read that at once
            wait.continue_or_raise(found, state)
            time.sleep(POLL_SECONDS)


class _Wait:
    """Wait of a starting run for the end of the previous run; the arguments are those of `acquire`."""

    def __init__(self, root: Path, log: Callable[[str], object], patience: float) -> None:
        self._root, self._log, self._patience = root, log, patience
        self._began = self._first_read_at = time.monotonic()
        self._first: LockReading | None = None  # first reading of the present lock, made at _first_read_at
        self._logged = ""

    def is_over(self, found: LockReading, own: Process) -> bool:
        """Return whether the lock of a `silent` run has not been touched for STALE_SECONDS since it was first read.

        This is measured from the first reading, since the age of a touch is wrong after a clock was set back.
        """
        stale = time.monotonic() - self._first_read_at > STALE_SECONDS
        return self._first == found and stale and found.state(own) == "silent"

    def continue_or_raise(self, found: LockReading, state: str) -> None:
        """Log what is waited for. Raise InputError if the other run is alive, or has not ended within the time limit."""
        now = time.monotonic()
        if self._first is None or self._first.text != found.text:
            self._first, self._first_read_at = found, now
        touched = state == "silent" and found.touched != self._first.touched
        limit = self._patience if state == "dying" else STALE_SECONDS + 2 * TOUCH_SECONDS
        if state == "alive" or touched or now - self._began > limit:
            advice = f"wait for its end, end it, or give another --save (the lock is {self._root / LOCK_FILE})"
            raise InputError(f"--save {self._root} is in use by another run, {found}; {advice}")
        why = "is ending" if state == "dying" else "has not touched its lock so far"
        line = f"waiting for up to {limit:.0f} s: an earlier run in {self._root}, {found}, {why}"
        if line != self._logged:
            self._log(line)
            self._logged = line


def read_lock(path: Path) -> LockReading | None:
    """Read a lock file; return None if it does not exist.

    Raises:
        OSError: the file cannot be read, or no file can be written beside it.
    """
    if (read := _read(path)) is None:
        return None
    text, touched = read
    with _temporary_file(
        path, ""
    ) as temporary:  # its time is by the clock of the file system, which may differ from that of this host
        return LockReading(text, touched, (os.stat(temporary).st_mtime_ns - touched) / 1e9)


def _read(path: Path) -> tuple[str, int] | None:
    """Return the text of a lock file and the time of its last touch in nanoseconds; None if it does not exist."""
    # Opened for each reading, since NFS asks the server for the current state only on open (close-to-open consistency).
    try:  # O_NONBLOCK, so that opening a named pipe in its place does not block
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    with open(descriptor, "rb") as file:
        return file.read(MAX_BYTES).decode("utf-8", errors="replace"), os.fstat(descriptor).st_mtime_ns


@contextmanager
def _temporary_file(path: Path, text: str) -> Iterator[Path]:
    """Write a temporary file beside `path`, touched now by the file system's clock; remove it at the end of the block."""
    temporary = path.with_name(f"{path.name}.{os.uname().nodename}.{os.getpid()}.{threading.get_ident()}")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        os.utime(temporary)
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _create(path: Path, holder: LockHolder) -> bool:
    """Create the lock file together with its text; return False if another run has created it first."""
    with _temporary_file(path, holder.to_text()) as temporary:
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        except OSError:  # the file system does not support hard links
            try:
                descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            except FileExistsError:
                return False
            with open(descriptor, "w", encoding="utf-8") as file:
                file.write(holder.to_text())
    return True


def _remove_dead_lock(path: Path, dead: LockReading) -> bool:
    """Remove the lock of a dead run. If another run has replaced it since it was read, keep that and return False."""
    aside = path.with_name(f"{path.name}.dead.{os.uname().nodename}.{os.getpid()}")
    try:
        os.rename(path, aside)
    except FileNotFoundError:
        return True
    # If another run has created its own lock between the reading and the rename, put that one back.
    is_dead = (_read(aside) or ("",))[0] == dead.text
    if not is_dead:
        with suppress(FileExistsError):
            os.link(aside, path)
    aside.unlink()
    return is_dead


def acquire_for_run(save: str, by_torchrun: bool, log: Callable[[str], object]) -> Lock | None:
    """Acquire the lock of --save for the run that this process is rank 0 of; see `acquire`.

    Args:
        save: the directory.
        by_torchrun: torchrun is the parent of this process; when it ends, it ends the ranks.
        log: called with a line about what `acquire` waits for.
    """
    launcher = Process.here(os.getppid()) if by_torchrun else None
    return acquire(Path(save), LockHolder(time.strftime("%Y-%m-%d %H:%M:%S"), (Process.own(),), launcher), log)


@contextmanager
def hold_lock(
    save: str | None, guard: Guard, env: LaunchEnvironment, log: Callable[[str], object]
) -> Iterator[Callable[[], None]]:
    """Hold the lock of --save inside the block. Called by all ranks; the first rank acquires the lock.

    Args:
        save: the directory; None locks nothing.
        guard: connects the ranks before the process group forms.
        env: this process's launch environment.
        log: called with a line about what the first rank waits for.

    Yields:
        A function to call when all ranks have prepared their inputs; it writes their processes into the lock file.

    Raises:
        InputError: on all ranks, when another run holds the lock.
    """
    if save is None:
        yield lambda: None
        return
    locks: list[Lock] = []  # the lock, on the first rank

    def acquire_on_rank_0() -> str | None:
        try:
            lock = acquire_for_run(save, env.launcher == "torchrun", log)
            locks.extend([] if lock is None else [lock])
        except InputError as error:
            return str(error)
        return None

    def record_ranks() -> None:
        ranks = guard.processes(Process.own(), env.rank)
        for lock in locks:
            lock.set_processes(ranks or [])
            guard.watch.at_end = lock.release

    if (problem := guard.ask_rank_0(env.rank, f"taking the lock of {save}", acquire_on_rank_0)) is not None:
        raise InputError(problem)
    try:
        yield record_ranks
    finally:
        for lock in locks:
            lock.release()


@contextmanager
def _flock(root: Path) -> Iterator[None]:
    """Hold the directory's flock inside the block, if the file system supports flock and it is free within a second."""
    descriptor = os.open(root, os.O_RDONLY)
    try:
        for _ in range(20):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.05)
            except OSError:
                break  # the file system does not support flock
        yield
    finally:
        os.close(descriptor)
