"""One run at a time in a --save: the file `.lock` in it, which the first rank of a run holds. Imports no torch.

The file names the processes of the run, and is touched every few seconds. Whether its run still lives is told by the process
table on its own host, and from another host by the touching: so no lock outlives its run by more than a minute, wherever the
next one starts, and a file system needs no locks of its own. The file comes to be by a link, or by O_EXCL, which file servers
honour; where flock works it also keeps two starts from judging a dead run's lock at the same moment.

A run of which one rank was killed ends within half a minute, rank by rank. Whoever starts meanwhile waits for that.
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
MAX_BYTES = 1 << 24  # of the file: a hundred thousand processes
TOUCH_SECONDS = 5.0  # seconds between two touches
# Without a touch for so long a run, or what is left of it, counts as dead where its processes cannot be looked up.
STALE_SECONDS = 45.0
POLL_SECONDS = 0.5  # seconds between two looks


@dataclass(frozen=True)
class LockHolder:
    """The run that holds a lock, as the file names it.

    Attributes:
        since: date and time, in words.
        ranks: its processes, the first rank's first.
        launcher: the process that the ranks do not outlive; None where there is none.
    """

    since: str
    ranks: tuple[Process, ...]
    launcher: Process | None = None

    @classmethod
    def of(cls, text: str) -> LockHolder | None:
        """Parse the text of a lock file; None for a text that no run writes."""
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
        text: of the file.
        touched: when it was, by its own disk's clock, in nanoseconds.
        age: seconds since then; it does not count where readings are compared.
    """

    text: str
    touched: int
    age: float = field(compare=False)

    @property
    def holder(self) -> LockHolder | None:
        """The run that holds it; None where its file does not say."""
        return LockHolder.of(self.text)

    def __str__(self) -> str:
        return str(self.holder or f"which left no name, {self.age:.0f} s ago")

    def state(self, own: Process) -> str:
        """Return the state of the run that holds it: `gone`, `dying`, `alive`; `silent` where only touches will tell."""
        holder = self.holder
        # A file that names nobody, such as one that a full disk cut off.
        if holder is None:
            return "gone" if self.age > STALE_SECONDS else "silent"
        launcher = () if holder.launcher is None else (holder.launcher,)
        first, *others = (process.state(own) for process in holder.ranks)
        # Not this process itself: under the number of a dead one it would keep that run alive.
        here = [process for process in holder.ranks if process != own and process.state(own) in ("alive", "stopped")]
        if first == "unknown":  # on another host, where only the touches tell
            return ("dying" if here else "gone") if self.age > STALE_SECONDS else "silent"
        if not here and ("unknown" not in others or self.age > STALE_SECONDS):
            return "gone"
        died = "gone" in (first, *others, *(process.state(own) for process in launcher))
        return "dying" if died or not here else "alive"


class Lock:
    """The lock of a directory, held by this process and touched by a thread of its own. Made by `acquire`.

    Args:
        root: the directory.
        holder: this run, as the file names it.
        lost: called with a message when the file is another run's; by default it ends the process, whose checkpoints and the
            other's would be written over one another.
        made: the directory was not there before, so it may go again.
    """

    def __init__(
        self, root: Path, holder: LockHolder, lost: Callable[[str], object] | None = None, *, made: bool = False
    ) -> None:
        self.root, self.holder, self._made = root, holder, made
        self._path, self._lost = root / LOCK_FILE, lost or _end
        self._over, self._changing = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._touch, name="lock", daemon=True)
        self._thread.start()

    def name_ranks(self, ranks: Sequence[Process]) -> None:
        """Note all processes of the run, so that the next one waits for the end of each."""
        with self._changing, suppress(OSError):
            self.holder = replace(self.holder, ranks=tuple(ranks))
            # A rename replaces the file as a whole: whoever reads it meanwhile sees the old text or the new one.
            with _written(self._path, self.holder.to_text()) as fresh:
                os.replace(fresh, self._path)

    def release(self) -> None:
        """Remove the file, and the directory if it was made for it and nothing else is in it."""
        self._over.set()
        self._thread.join()  # or it would make the file again
        with suppress(OSError):
            if self._ours((_read(self._path) or (None,))[0]):
                self._path.unlink()
                if self._made:
                    self.root.rmdir()

    def _ours(self, text: str | None) -> bool:
        holder = None if text is None else LockHolder.of(text)
        return holder is not None and holder.ranks[0] == self.holder.ranks[0]

    def _touch(self) -> None:
        while not self._over.wait(TOUCH_SECONDS):
            with self._changing, suppress(OSError):
                text, _ = _read(self._path) or (None, 0)
                if self._ours(text):
                    os.utime(self._path)
                elif text is not None:
                    other = LockHolder.of(text) or "another run"
                    self._lost(
                        f"error: --save {self.root} was taken over by {other}: this run gave no sign for {STALE_SECONDS:.0f} s"
                    )
                elif self.root.is_dir():  # the file was deleted by hand, the directory is still ours
                    _create(self._path, self.holder)


def _end(text: str) -> None:
    write_stderr(f"{text}\n")
    write_error_file(text)
    os._exit(1)


def acquire(root: Path, holder: LockHolder, tell: Callable[[str], object], patience: float = STALE_SECONDS) -> Lock | None:
    """Acquire the lock of a directory, which is made where it is not there yet. Waits for a run that is ending.

    Args:
        root: the directory that the run saves to.
        holder: the run. Its first process is this one.
        tell: is given a line when there is something to wait for.
        patience: seconds to wait for a run that is ending.

    Returns:
        The lock; None, with a warning, where the disk takes no file.

    Raises:
        InputError: another run holds it, and goes on to hold it; or the directory cannot be made.
    """
    wait, own, made = _Wait(root, tell, patience), holder.ranks[0], not os.path.exists(root)
    while True:
        try:
            root.mkdir(parents=True, exist_ok=True)
            with _alone(root):  # two starts must not both judge a dead run's lock, and one clear the other's new one
                seen = read_lock(root / LOCK_FILE)
                state = "gone" if seen is None or wait.is_over(seen, own) else seen.state(own)
                if state == "gone" and (seen is None or _cleared(root / LOCK_FILE, seen)) and _create(root / LOCK_FILE, holder):
                    return Lock(root, holder, made=made)
        except OSError as error:
            if not os.path.isdir(root):  # then no checkpoint could be written either
                raise InputError(f"--save {root}: cannot be made: {error.strerror}; choose another place") from error
            logging.getLogger(__name__).warning("%s: no lock can be kept here: %s", root / LOCK_FILE, error.strerror)
            return None
        if seen is not None and state != "gone":  # otherwise another start was faster
            wait.go_on(seen, state)
            time.sleep(POLL_SECONDS)


class _Wait:
    """A start's wait for the end of the run before it; arguments as for `acquire`."""

    def __init__(self, root: Path, tell: Callable[[str], object], patience: float) -> None:
        self._root, self._tell, self._patience = root, tell, patience
        self._began = self._since = time.monotonic()  # since: how long the first look at this lock is ago
        self._first: LockReading | None = None
        self._told = ""

    def is_over(self, seen: LockReading, own: Process) -> bool:
        """Return whether a lock that only touches tell of has gone without one for long enough.

        Whatever time its touch bears: one of a clock that was set back is never old.
        """
        return self._first == seen and time.monotonic() - self._since > STALE_SECONDS and seen.state(own) == "silent"

    def go_on(self, seen: LockReading, state: str) -> None:
        """Report what is waited for. InputError where the other run lives, or has been given time enough."""
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
        if line != self._told:
            self._tell(line)
            self._told = line


def read_lock(path: Path) -> LockReading | None:
    """Return the state of a lock file now; None where there is none.

    Raises:
        OSError: it cannot be read, or nothing can be written beside it.
    """
    if (read := _read(path)) is None:
        return None
    text, touched = read
    with _written(path, "") as fresh:  # tells the disk's clock, which may differ from this host's
        return LockReading(text, touched, (os.stat(fresh).st_mtime_ns - touched) / 1e9)


def _read(path: Path) -> tuple[str, int] | None:
    """Return the text of a lock, and when it was touched, in nanoseconds; None where there is none."""
    # Opened anew each time: only then does a client of a file server ask the server for the present state.
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    with open(descriptor, "rb") as file:
        return file.read(MAX_BYTES).decode("utf-8", errors="replace"), os.fstat(descriptor).st_mtime_ns


@contextmanager
def _written(path: Path, text: str) -> Iterator[Path]:
    """Write a file of this process beside `path`, touched this very moment by the disk's clock; it is gone afterwards."""
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
    """Make the file, whole from the start; False where another was faster."""
    with _written(path, holder.to_text()) as fresh:
        try:
            os.link(fresh, path)
        except FileExistsError:
            return False
        except OSError:  # a file system without links
            try:
                descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            except FileExistsError:
                return False
            with open(descriptor, "w", encoding="utf-8") as file:
                file.write(holder.to_text())
    return True


def _cleared(path: Path, dead: LockReading) -> bool:
    """Take a dead run's lock out of the way; False where it is another's by now, which stays."""
    aside = path.with_name(f"{path.name}.dead.{os.uname().nodename}.{os.getpid()}")
    try:
        os.rename(path, aside)
    except FileNotFoundError:
        return True
    # Between the look and the rename another start may have put its own lock there: then it goes back.
    same = (_read(aside) or ("",))[0] == dead.text
    if not same:
        with suppress(FileExistsError):
            os.link(aside, path)
    aside.unlink()
    return same


def acquire_for_run(save: str, launched: bool, tell: Callable[[str], object]) -> Lock | None:
    """Acquire the lock of --save for the run of this process; see `acquire`.

    Args:
        save: the directory.
        launched: torchrun started this process, and ends with it.
        tell: is given a line when there is something to wait for.
    """
    launcher = Process.here(os.getppid()) if launched else None
    return acquire(Path(save), LockHolder(time.strftime("%Y-%m-%d %H:%M:%S"), (Process.own(),), launcher), tell)


@contextmanager
def hold_lock(
    save: str | None, guard: Guard, env: LaunchEnvironment, tell: Callable[[str], object]
) -> Iterator[Callable[[], None]]:
    """Hold --save for this job alone inside the block. Called by all ranks; the first one holds the lock.

    Args:
        save: the directory; None locks nothing.
        guard: joins the ranks before the process group forms.
        env: the launcher's description of this process.
        tell: is given a line when there is something to wait for.

    Yields:
        A function to call when all ranks have come, which notes their processes.

    Raises:
        InputError: on all ranks, when another run holds it.
    """
    if save is None:
        yield lambda: None
        return
    held: list[Lock] = []

    def first() -> str | None:
        try:
            held.extend(lock for lock in [acquire_for_run(save, env.launcher == "torchrun", tell)] if lock is not None)
        except InputError as error:
            return str(error)
        return None

    def joined() -> None:
        ranks = guard.processes(Process.own(), env.rank)
        for lock in held:
            lock.name_ranks(ranks or [])
            guard.watch.at_end = lock.release

    if (wrong := guard.ask_rank_0(env.rank, f"taking the lock of {save}", first)) is not None:
        raise InputError(wrong)
    try:
        yield joined
    finally:
        for lock in held:
            lock.release()


@contextmanager
def _alone(root: Path) -> Iterator[None]:
    """Keep other starts from looking at the lock inside the block, where the file system can see to that."""
    descriptor = os.open(root, os.O_RDONLY)
    try:
        for _ in range(20):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.05)
            except OSError:
                break  # it cannot
        yield
    finally:
        os.close(descriptor)
