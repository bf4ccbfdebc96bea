"""What a run writes beside its checkpoints, and may lose: a disk that refuses costs a warning, never the run."""

from __future__ import annotations

import io
import logging
import os
import stat
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO, cast

MAX_WAITING = 10_000  # pieces that are kept while they cannot be written; then the oldest go


class SideFile:
    """A file that is only added to. What cannot be written waits in memory, and goes out with what is added next.

    It is opened for each addition, so a file or directory that somebody removes is made again; and cut back where only a part
    was written, so that it never holds half a piece.

    path: the file. what: its content in a word, for the warning. head: what an empty file begins with.
    """

    def __init__(self, path: Path, what: str, head: bytes = b"") -> None:
        self.path, self._what, self._head = path, what, head
        self._waiting: deque[bytes] = deque(maxlen=MAX_WAITING)
        self._failing = False

    def add(self, *pieces: bytes) -> None:
        """Append the pieces, in order, as far as the disk takes them."""
        self._waiting.extend(pieces)
        try:
            self._write()
        except OSError as error:
            if not self._failing:
                later = "the run goes on, and it is tried again with what comes next"
                warn(self.path, f"{self._what} cannot be written", error, later)
            self._failing = True
        else:
            self._failing = False
            self._waiting.clear()

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK, 0o666)
        try:
            about = os.fstat(descriptor)
            fresh = stat.S_ISREG(about.st_mode) and about.st_size == 0
            left = memoryview(b"".join([self._head if fresh else b"", *self._waiting]))
            try:
                while left:
                    left = left[os.write(descriptor, left) :]
            except OSError:
                with suppress(OSError):  # there is nothing to cut off a device
                    os.ftruncate(descriptor, about.st_size)
                raise
        finally:
            os.close(descriptor)


def warn(path: object, what: str, error: BaseException, then: str = "the run goes on without it") -> None:
    """Say once that a side file failed: path, what cannot be done, why, and what follows."""
    cause = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
    logging.getLogger(__name__).warning("%s: %s: %s; %s", path, what, cause, then)


@contextmanager
def optional(path: object, what: str) -> Iterator[None]:
    """Turn an OSError of the block into a warning. what: what cannot be done then."""
    try:
        yield
    except OSError as error:
        warn(path, what, error)


class SideStream:
    """Standard output or error of a run, for which a full disk or a reader that has left is no reason to end.

    Everything but writing is the stream's own.
    """

    def __init__(self, stream: TextIO, name: str) -> None:
        self._stream, self._name, self.failed = stream, name, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write what the stream takes."""
        with self._forgiving():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Pass on what is in the buffer, as far as the stream takes it."""
        with self._forgiving():
            self._stream.flush()

    @contextmanager
    def _forgiving(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            first, self.failed = not self.failed, True
            if first and self._name == "standard output":
                warn(self._name, "cannot be written to", error, "the run goes on, and lines are lost meanwhile")

    def release(self) -> None:
        """Drop what the stream does not take, or the interpreter would report it as a failure of the program."""
        if not self.failed:
            return
        try:
            self._stream.flush()
        except OSError:
            with suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)
                self._stream.flush()


@contextmanager
def forgiving_streams() -> Iterator[None]:
    """Let nothing that is printed inside fail. Where a stream is closed from the beginning, it goes nowhere."""
    before = sys.stdout, sys.stderr
    streams = [SideStream(before[0] or _nothing(), "standard output"), SideStream(before[1] or _nothing(), "standard error")]
    sys.stdout, sys.stderr = (cast(TextIO, stream) for stream in streams)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        for stream in streams:
            stream.flush()
            stream.release()


def _nothing() -> TextIO:
    return io.TextIOWrapper(open(os.devnull, "wb"), encoding="utf-8")
