"""Write the side files of a run, such as metrics, and its console: if a write fails, the run prints a warning and continues."""

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

MAX_WAITING = 10_000  # maximum number of pieces that are kept while they cannot be written; the oldest are dropped


class SideFile:
    """An append-only file. Pieces that cannot be written are kept in memory, and written together with the next ones.

    The file is opened for each addition, so it is created again if somebody removes it. After a partial write it is truncated,
    so that it never holds half a piece.

    Args:
        path: the file.
        what: name of its content, for the warning.
        head: the first bytes of an empty file.
    """

    def __init__(self, path: Path, what: str, head: bytes = b"") -> None:
        self.path, self._what, self._head = path, what, head
        self._waiting: deque[bytes] = deque(maxlen=MAX_WAITING)
        self._failing = False

    def add(self, *pieces: bytes) -> None:
        """Append the pieces in order; those that cannot be written are kept for the next call."""
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
                with suppress(OSError):  # a device cannot be truncated
                    os.ftruncate(descriptor, about.st_size)
                raise
        finally:
            os.close(descriptor)


def warn(path: object, what: str, error: BaseException, then: str = "the run goes on without it") -> None:
    """Log a warning that a side file failed.

    Args:
        path: the file.
        what: what failed.
        error: the reason.
        then: the consequence.
    """
    cause = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
    logging.getLogger(__name__).warning("%s: %s: %s; %s", path, what, cause, then)


@contextmanager
def warning_on_error(path: object, what: str) -> Iterator[None]:
    """Turn an OSError of the block into a warning. what: what failed, for the warning."""
    try:
        yield
    except OSError as error:
        warn(path, what, error)


class SideStream:
    """Wraps standard output or error of a run: a full disk, or a reader that has left, does not end the run."""

    def __init__(self, stream: TextIO, name: str) -> None:
        self._stream, self._name, self.failed = stream, name, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write the text if the stream accepts it."""
        with self._warn_once():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Write the buffered text if the stream accepts it."""
        with self._warn_once():
            self._stream.flush()

    @contextmanager
    def _warn_once(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            first, self.failed = not self.failed, True
            if first and self._name == "standard output":
                warn(self._name, "cannot be written to", error, "the run goes on, and lines are lost meanwhile")

    def release(self) -> None:
        """Drop buffered text that cannot be written, which the interpreter would report as an error at exit."""
        if not self.failed:
            return
        try:
            self._stream.flush()
        except OSError:
            _drop(self._stream)


@contextmanager
def forgiving_streams() -> Iterator[None]:
    """Ignore errors of printing inside the block. A stream that was closed from the beginning is replaced by /dev/null."""
    before = sys.stdout, sys.stderr
    names = ("standard output", "standard error")
    streams = [SideStream(_unwrap(stream) or _null_stream(), name) for stream, name in zip(before, names, strict=True)]
    sys.stdout, sys.stderr = (cast(TextIO, stream) for stream in streams)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        for stream in streams:
            stream.flush()
            stream.release()


def _null_stream() -> TextIO:
    """Return a stream to /dev/null."""
    return io.TextIOWrapper(open(os.devnull, "wb"), encoding="utf-8")


class PipedStream:
    """Wraps standard output or error of a tool: when the reader has left, the program ends silently, as by SIGPIPE.

    It ends by SystemExit, which no handler of errors catches. Other failures, such as a full disk, are reported.
    """

    def __init__(self, stream: TextIO, name: str) -> None:
        self._stream, self._name = stream, name

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write the text, or end the program."""
        with self._exit_on_error():
            self._stream.write(text)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write the lines, or end the program."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Write the buffered text, or end the program."""
        with self._exit_on_error():
            self._stream.flush()

    @contextmanager
    def _exit_on_error(self) -> Iterator[None]:
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
    """End the program if text that is printed inside the block cannot be written, including what is buffered at its end."""
    before = sys.stdout, sys.stderr
    names = ("standard output", "standard error")
    streams = [stream and PipedStream(stream, name) for stream, name in zip(map(_unwrap, before), names, strict=True)]
    sys.stdout, sys.stderr = (cast(TextIO, stream) for stream in streams)
    try:
        yield
    finally:
        try:
            for stream in filter(None, streams):
                stream.flush()
        finally:
            sys.stdout, sys.stderr = before


def _unwrap(stream: Any) -> Any:
    """Return a stream without the wrapper of another block; None for one that was closed from the beginning."""
    return stream._stream if isinstance(stream, SideStream | PipedStream) else stream


def _drop(stream: TextIO) -> None:
    """Redirect a stream that cannot be written to /dev/null, since the interpreter would report its error again at exit."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
        stream.flush()
