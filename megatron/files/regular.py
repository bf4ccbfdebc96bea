"""Read files of users safely: only regular files, after checking their size.

A path may lead to a pipe, which may block forever, to an endless device, to a directory, or to a file larger than the memory.
Every reader uses these functions, or calls `check_regular` before it passes a path to a library. Their errors are OSErrors, so
the handlers of missing files handle them, too; the message states the kind of file.
"""

from __future__ import annotations

import errno
import io
import json
import os
import re
import stat
import sys
import time
from collections.abc import Callable
from typing import Any, BinaryIO

PathLike = str | os.PathLike[str]

MAX_SETTINGS_BYTES = 1 << 24  # config.json and the like; the largest known ones have 2 MB
MAX_TOML_BYTES = 1 << 20  # tomllib is slow: it needs a second for this size
MAX_INDEX_BYTES = 1 << 25  # the index of a model's tensors; for 100,000 tensors it has 10 MB
MAX_VOCABULARY_BYTES = 1 << 27  # tokenizer.json, vocab.json, merges.txt, tokenizer.model; the largest known ones have 60 MB
MAX_TEXT_BYTES = 1 << 30  # a text that is read at once, for scoring or training
MAX_PROMPTS_BYTES = 1 << 26  # a file of prompts
MAX_METRICS_BYTES = 1 << 31  # metrics.jsonl; a line has 400 bytes
MAX_LINE_BYTES = 1 << 28  # one line of a corpus: a document

MAX_TASK_JSON_BYTES = 1 << 27  # a task's dataset that is one JSON value; SQuAD's largest has 42 MB
MAX_DEPTH = 200  # maximum nesting of lists and objects in JSON
MAX_VALUES = 10_000_000  # maximum number of values in a JSON text; an empty list has 2 bytes there and 64 in memory
JSON_STRING = re.compile(r'"[^"]*+"?')  # a JSON string in a text from which escaped quotes were removed
PIPE_TIMEOUT = 5.0  # seconds to wait for a writer of a named pipe

FILE_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


class UnfitFile(OSError):
    """The path is not a regular file, or the file is too large. Its text as an OSError is the reason, without the path."""

    def __init__(self, path: PathLike, what: str) -> None:
        super().__init__(errno.EINVAL, what, os.fspath(path))

    def __str__(self) -> str:
        return f"{self.filename}: {self.strerror}"


def error_reason(error: BaseException) -> str:
    """Return the reason of an error of a file, without its path and errno."""
    return str(getattr(error, "strerror", None) or error or type(error).__name__)


def describe_file_kind(mode: int) -> str:
    """Describe the kind of file of an `st_mode`; "" for a regular file."""
    if stat.S_ISREG(mode):
        return ""
    return next((description for test, description in FILE_KINDS if test(mode)), "something else")


def check_regular(path: PathLike, max_bytes: int | None = None) -> int:
    """Return the size in bytes of a regular file, following symlinks. It is not opened: opening a device can have side effects.

    Raises:
        UnfitFile: the path is not a regular file, or the file has more than `max_bytes`.
        OSError: `os.stat` failed, for instance because there is no such file.
    """
    return _check_status(path, _stat(path), max_bytes)


def _stat(path: PathLike) -> os.stat_result:
    """Return `os.stat` of a path, with clearer errors for broken symlinks and null bytes."""
    try:
        return os.stat(path)
    except FileNotFoundError:
        if os.path.islink(path):
            what = f"a link to {os.readlink(path)}, which does not exist"
            raise FileNotFoundError(errno.ENOENT, what, os.fspath(path)) from None
        raise
    except ValueError as error:
        why = "it contains a null byte" if "\0" in os.fsdecode(path) else error  # Python's message differs between versions
        raise UnfitFile(repr(os.fspath(path)), f"not a file name: {why}") from None


def _check_status(path: PathLike, status: os.stat_result, max_bytes: int | None) -> int:
    if kind := describe_file_kind(status.st_mode):
        raise UnfitFile(path, f"{kind}, not a regular file")
    if max_bytes is not None and status.st_size > max_bytes:
        raise _too_large(path, status.st_size, max_bytes)
    return status.st_size


def _too_large(path: PathLike, size: int, max_bytes: int) -> UnfitFile:
    return UnfitFile(path, f"{size:,} bytes, more than the {max_bytes:,} allowed for such a file")


def open_regular(path: PathLike, max_bytes: int | None = None) -> BinaryIO:
    """Open a regular file for reading bytes.

    Raises:
        UnfitFile: as `check_regular`, also if the path is replaced by something else between the check and the opening.
    """
    check_regular(path, max_bytes)
    # O_NONBLOCK has no effect on regular files; without it, opening would block if a pipe had replaced the file.
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    try:
        _check_status(path, os.fstat(handle), max_bytes)
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


class _Pipe(io.FileIO):
    """A non-blocking pipe that stores the result of its last read: 0 without a writer, None if the writer has sent nothing."""

    last_read: int | None = None

    def readinto(self, buffer: Any) -> int | None:
        self.last_read = super().readinto(buffer)
        return self.last_read


def open_stream(path: PathLike, pipe_timeout: float = PIPE_TIMEOUT, *, max_bytes: int | None = None) -> BinaryIO:
    """Open a regular file, or a pipe as in `--input <(zcat corpus.gz)`, for reading once from beginning to end.

    Args:
        path: the file or pipe.
        pipe_timeout: seconds to wait for a writer of a named pipe.
        max_bytes: maximum size of a regular file; None for any size.

    Raises:
        UnfitFile: the path is something else, the file is larger, or no program opens the named pipe for writing in time.
    """
    if not stat.S_ISFIFO(_stat(path).st_mode):
        return open_regular(path, max_bytes)
    named = not os.path.basename(os.path.realpath(path)).startswith("pipe:[")
    pipe = _Pipe(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))
    file = io.BufferedReader(pipe, 1 << 20)
    deadline = time.monotonic() + pipe_timeout
    while not file.peek(1) and pipe.last_read == 0 and named:
        if time.monotonic() > deadline:
            file.close()
            raise UnfitFile(path, "a named pipe to which no program writes")
        time.sleep(0.02)
    os.set_blocking(pipe.fileno(), True)
    return file


def read_bytes(path: PathLike, max_bytes: int, *, pipes: bool = False) -> bytes:
    """Return all bytes of a regular file.

    Args:
        path: the file.
        max_bytes: maximum size.
        pipes: the path may also be a pipe, see `open_stream`.

    Raises:
        UnfitFile: as `check_regular`, also if more than `max_bytes` are read from a file that was reported smaller.
    """
    with open_stream(path, max_bytes=max_bytes) if pipes else open_regular(path, max_bytes) as file:
        data = file.read(min(max_bytes, os.fstat(file.fileno()).st_size) + 1)
        # The reported size is 0 for files in /proc, and too small for a growing file. One byte beyond the limit is read, too.
        data += file.read(max(0, max_bytes + 1 - len(data)))
    if len(data) > max_bytes:
        raise _too_large(path, len(data), max_bytes)
    return data


def read_text(path: PathLike, max_bytes: int, *, pipes: bool = False) -> str:
    """Return the text of a regular file in UTF-8.

    Args:
        path: the file.
        max_bytes: maximum size.
        pipes: the path may also be a pipe, see `open_stream`.

    Raises:
        UnfitFile: see `read_bytes`.
        UnicodeDecodeError: the bytes are not UTF-8. This is a subclass of ValueError.
    """
    return read_bytes(path, max_bytes, pipes=pipes).decode("utf-8")


def read_json(path: PathLike, max_bytes: int = MAX_SETTINGS_BYTES) -> Any:
    """Return the value of a JSON file.

    Raises:
        UnfitFile: see `read_bytes`.
        ValueError: the file is not JSON; the message says why.
    """
    return parse_json(read_bytes(path, max_bytes))


def parse_json(text: str | bytes, parse_int: Callable[[str], Any] | None = None) -> Any:
    """Return the value of a JSON text.

    Args:
        text: the text, or its bytes in UTF-8.
        parse_int: converts the digits of each whole number; None for `int`.

    Raises:
        ValueError: the text is not JSON, has a number with too many digits, or exceeds `MAX_DEPTH` or `MAX_VALUES`.
    """
    try:
        text = text if isinstance(text, str) else text.decode("utf-8-sig")
        if count_values(text) > MAX_VALUES:
            raise ValueError(f"it has more than {MAX_VALUES:,} values")
        value = json.loads(text, parse_int=parse_int)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except ValueError as error:
        if "integer string conversion" in str(error):
            raise ValueError(f"a number in it has more than {sys.get_int_max_str_digits()} digits") from None
        raise
    if _is_deeper(value, MAX_DEPTH):
        raise ValueError("it is nested too deeply")
    return value


def count_values(text: str) -> int:
    """Estimate the number of values in a JSON text without parsing it, from its opening brackets and commas.

    Those inside strings are excluded only if the count would exceed `MAX_VALUES`, since that takes time.
    """
    count = sum(map(text.count, "[{,"))
    if count <= MAX_VALUES:
        return count
    return sum(map(JSON_STRING.sub("", text.replace("\\\\", "").replace('\\"', "")).count, "[{,"))


def _is_deeper(value: Any, levels: int) -> bool:
    """Return whether a JSON value has more levels than this; printing or copying it could exceed Python's recursion limit."""
    containers = [value] if isinstance(value, dict | list) else []
    for _ in range(levels):
        items = (item for outer in containers for item in (outer.values() if isinstance(outer, dict) else outer))
        containers = [item for item in items if isinstance(item, dict | list)]
        if not containers:
            return False
    return bool(containers)
