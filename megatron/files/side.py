"""Write a run's side files, such as metrics, and its console output: a failed write is a warning, and the run continues.

For tools, it provides streams whose failure ends the program.
"""

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

MAX_UNWRITTEN = 10_000  # maximum number of pieces buffered while writing fails; the oldest are dropped


class SideFile:
    """An append-only file. Pieces that cannot be written are buffered, and written together with the next ones.

    The file is opened for each addition, so it is created again if it is deleted. After a partial write it is truncated to its
    old size, so that it never contains part of a piece.

    Args:
        path: the file.
        what: what the file contains, for the warning.
        header: bytes to write at the beginning of an empty file.
    """

    def __init__(self, path: Path, what: str, header: bytes = b"") -> None:
        self.path, self._what, self._header = path, what, header
        self._unwritten: deque[bytes] = deque(maxlen=MAX_UNWRITTEN)
        self._failing = False

    def add(self, *pieces: bytes) -> None:
        """Append the pieces in order; if that fails, they are buffered for the next call."""
        self._unwritten.extend(pieces)
        try:
            self._write()
        except OSError as error:
            if not self._failing:
                consequence = "the run goes on, and the next write tries again"
                warn(self.path, f"{self._what} cannot be written", error, consequence)
            self._failing = True
        else:
            self._failing = False
            self._unwritten.clear()

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK, 0o666)
        try:
            status = os.fstat(descriptor)
            is_empty = stat.S_ISREG(status.st_mode) and status.st_size == 0
            remaining = memoryview(b"".join([self._header if is_empty else b"", *self._unwritten]))
            try:
                while remaining:
                    remaining = remaining[os.write(descriptor, remaining) :]
            except OSError:
                with suppress(OSError):  # a device cannot be truncated
                    os.ftruncate(descriptor, status.st_size)
                raise
        finally:
            os.close(descriptor)


def warn(path: object, what: str, error: BaseException, consequence: str = "the run goes on without it") -> None:
    """Log a warning that a side file failed.

    Args:
        path: the file.
        what: what went wrong, as a clause.
        error: the error that was caught.
        consequence: how the run continues.
    """
    cause = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
    logging.getLogger(__name__).warning("%s: %s: %s; %s", path, what, cause, consequence)


@contextmanager
def warning_on_error(path: object, what: str) -> Iterator[None]:
    """Turn an OSError of the block into a warning about the file `path`. what: what went wrong, as a clause."""
    try:
        yield
    except OSError as error:
        warn(path, what, error)


class SideStream:
    """Wraps standard output or error of a run, so that a full disk or a closed pipe does not end the run."""

    def __init__(self, stream: TextIO, name: str) -> None:
        self._stream, self._name, self.failed = stream, name, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write the text; an OSError is ignored, and the first one of standard output is logged as a warning."""
        with self._warn_once():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush the stream; an OSError is handled as in `write`."""
        with self._warn_once():
            self._stream.flush()

    @contextmanager
    def _warn_once(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            first, self.failed = not self.failed, True
            if first and self._name == "standard output":
                warn(self._name, "cannot be written to", error, "the run goes on, and lines are lost until it can be written")

    def release(self) -> None:
        """Discard buffered text that cannot be written: Python would report an error when it flushes the stream at exit."""
        if not self.failed:
            return
        try:
            self._stream.flush()
        except OSError:
            _redirect_to_null(self._stream)


@contextmanager
def forgiving_streams() -> Iterator[None]:
    """Ignore errors of printing inside the block. A stream that was closed when Python started is replaced by /dev/null."""
    original = sys.stdout, sys.stderr
    names = ("standard output", "standard error")
    streams = [SideStream(_unwrap(stream) or _null_stream(), name) for stream, name in zip(original, names, strict=True)]
    sys.stdout, sys.stderr = (cast(TextIO, stream) for stream in streams)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = original
        for stream in streams:
            stream.flush()
            stream.release()


def _null_stream() -> TextIO:
    """Return a stream to /dev/null."""
    return io.TextIOWrapper(open(os.devnull, "wb"), encoding="utf-8")


class PipedStream:
    """Wraps standard output or error of a tool, so that a closed pipe ends the program silently, as SIGPIPE would.

    It ends by SystemExit, which `except Exception` does not catch. Other failures, such as a full disk, are reported.
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
        """Flush the stream, or end the program."""
        with self._exit_on_error():
            self._stream.flush()

    @contextmanager
    def _exit_on_error(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            _redirect_to_null(self._stream)
            if isinstance(error, BrokenPipeError):
                raise SystemExit(128 + signal.SIGPIPE) from None
            if self._name != "standard error":
                print(f"error: {self._name} cannot be written: {error.strerror}", file=sys.stderr)
            raise SystemExit(1) from None


@contextmanager
def piped_streams() -> Iterator[None]:
    """End the program if text printed in the block cannot be written, at the latest by the flush at the end of the block."""
    original = sys.stdout, sys.stderr
    names = ("standard output", "standard error")
    streams = [stream and PipedStream(stream, name) for stream, name in zip(map(_unwrap, original), names, strict=True)]
    sys.stdout, sys.stderr = (cast(TextIO, stream) for stream in streams)
    try:
        yield
    finally:
        try:
            for stream in filter(None, streams):
                stream.flush()
        finally:
            sys.stdout, sys.stderr = original


def _unwrap(stream: Any) -> Any:
    """Return a stream without the wrapper of an outer block; None if it was closed when Python started."""
    return stream._stream if isinstance(stream, SideStream | PipedStream) else stream


def _redirect_to_null(stream: TextIO) -> None:
    """Redirect a broken stream to /dev/null, since Python would report the error again at exit."""
    with suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
        stream.flush()
