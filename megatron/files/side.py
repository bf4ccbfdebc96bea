"""Write what a run has beside its checkpoints and may lose: a disk that refuses costs a warning, never the run."""

from __future__ import annotations

import io
import logging
import os
import signal
import stat
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO, cast

MAX_WAITING = 10_000  # pieces that are kept while they cannot be written; then the oldest are lost


class SideFile:
    """A file that is only added to. What cannot be written waits in memory, and goes out with what is added next.

    It is opened for each addition, so a file or directory that somebody removes is made again; and cut back where only a part
    was written, so that it never holds half a piece.

    Args:
        path: of the file.
        what: its content in a word, for the warning.
        head: the first bytes of an empty file.
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
    """Say in the log that a side file failed.

    Args:
        path: of the file.
        what: what cannot be done.
        error: why.
        then: what follows.
    """
    cause = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
    logging.getLogger(__name__).warning("%s: %s: %s; %s", path, what, cause, then)


@contextmanager
def warning_on_error(path: object, what: str) -> Iterator[None]:
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
            _drop(self._stream)


@contextmanager
def forgiving_streams() -> Iterator[None]:
    """Let nothing that is printed inside fail. Where a stream is closed from the beginning, it goes nowhere."""
    before = sys.stdout, sys.stderr
    names = ("standard output", "standard error")
    streams = [SideStream(_bare(stream) or _nothing(), name) for stream, name in zip(before, names, strict=True)]
    sys.stdout, sys.stderr = (cast(TextIO, stream) for stream in streams)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        for stream in streams:
            stream.flush()
            stream.release()


def _nothing() -> TextIO:
    """Return a stream that goes nowhere."""
    return io.TextIOWrapper(open(os.devnull, "wb"), encoding="utf-8")


class PipedStream:
    """Standard output or error of a program that ends where nobody reads it any more, silently, as one that SIGPIPE ends.

    SystemExit says so, which no handler of errors takes for one of its own. Another failure, a full disk say, is named.
    """

    def __init__(self, stream: TextIO, name: str) -> None:
        self._stream, self._name = stream, name

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write the text, or end the program."""
        with self._ending():
            self._stream.write(text)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write the lines, or end the program."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Pass on what is in the buffer, or end the program."""
        with self._ending():
            self._stream.flush()

    @contextmanager
    def _ending(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            _drop(self._stream)
            if isinstance(error, BrokenPipeError):
                raise SystemExit(128 + signal.SIGPIPE) from None
            if self._name != "standard error":
                print(f"error: {self._name} cannot be written: {error.strerror}", file=sys.stderr)
            raise SystemExit(1) from None


@contextmanager
def piped_streams() -> Iterator[None]:
    """Let what is printed inside end the program where it cannot be written, what waits in buffers at the end included."""
    before = sys.stdout, sys.stderr
    names = ("standard output", "standard error")
    streams = [bare and PipedStream(bare, name) for bare, name in zip(map(_bare, before), names, strict=True)]
    sys.stdout, sys.stderr = (cast(TextIO, stream) for stream in streams)
    try:
        yield
    finally:
        try:
            for stream in filter(None, streams):
                stream.flush()
        finally:
            sys.stdout, sys.stderr = before


def _bare(stream: Any) -> Any:
    """Return the stream itself, without what another block has put around it; None where it is closed from the beginning."""
    return stream._stream if isinstance(stream, SideStream | PipedStream) else stream


def _drop(stream: TextIO) -> None:
    """Redirect a stream that cannot be written to nowhere, or the interpreter would report it once more at its end."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
        stream.flush()
