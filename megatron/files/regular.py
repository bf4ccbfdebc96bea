"""Read files of users safely: only regular files, whose size is known and bounded before the first byte is read.

A path can lead to a pipe, which blocks for ever, to an endless device, to a directory, or to a file larger than the memory.
Every reader uses these functions, or calls `check_regular` before it passes a path to a library. The error is an OSError that
names the kind of file, so that handlers of missing files cover it as well.
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
MAX_TOML_BYTES = 1 << 20  # tomllib is slow: a text of this size takes it a second
MAX_INDEX_BYTES = 1 << 25  # the table of a model's tensors; one of 100,000 tensors has 10 MB
MAX_VOCABULARY_BYTES = 1 << 27  # tokenizer.json, vocab.json, merges.txt, tokenizer.model; the largest known ones have 60 MB
MAX_TEXT_BYTES = 1 << 30  # a text that is scored or trained on as a whole
MAX_PROMPTS_BYTES = 1 << 26  # a file of prompts
MAX_METRICS_BYTES = 1 << 31  # metrics.jsonl; a line has 400 bytes
MAX_LINE_BYTES = 1 << 28  # one line of a corpus: a document

MAX_TASK_JSON_BYTES = 1 << 27  # a task's file that is one JSON value; SQuAD's largest has 42 MB
MAX_DEPTH = 200  # nesting of brackets in JSON
MAX_VALUES = 10_000_000  # values in a JSON text; an empty list has 2 bytes there and 64 in memory
STRING = re.compile(r'"[^"]*+"?')  # a JSON string in a text from which escaped quotes were removed
PIPE_TIMEOUT = 5.0  # seconds to wait for a writer of a named pipe

KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


class UnfitFile(OSError):
    """A path that is not a regular file, or is a file that is too large. `OSError.strerror` is the reason, without the path."""

    def __init__(self, path: PathLike, what: str) -> None:
        super().__init__(errno.EINVAL, what, os.fspath(path))

    def __str__(self) -> str:
        return f"{self.filename}: {self.strerror}"


def error_reason(error: BaseException) -> str:
    """Return the reason why a file cannot be read, without its path and the number of the error."""
    return str(getattr(error, "strerror", None) or error or type(error).__name__)


def describe_file_kind(mode: int) -> str:
    """Return a description of the kind of file of an `st_mode`; "" for a regular one."""
    if stat.S_ISREG(mode):
        return ""
    return next((description for test, description in KINDS if test(mode)), "something else")


def check_regular(path: PathLike, max_bytes: int | None = None) -> int:
    """Return the size in bytes of a regular file, following links. It is not opened, since opening a device can have effects.

    Raises:
        UnfitFile: the path is not a regular file, or the file has more than `max_bytes`.
        OSError: there is no such file; see `os.stat`.
    """
    return _check(path, _stat(path), max_bytes)


def _stat(path: PathLike) -> os.stat_result:
    """Return `os.stat` of a path, with clearer errors for broken links and null bytes."""
    try:
        return os.stat(path)
    except FileNotFoundError:
        if os.path.islink(path):
            what = f"a link to {os.readlink(path)}, which is not there"
            raise FileNotFoundError(errno.ENOENT, what, os.fspath(path)) from None
        raise
    except ValueError as error:
        why = "it holds a null byte" if "\0" in os.fsdecode(path) else error  # Python's message differs between versions
        raise UnfitFile(repr(os.fspath(path)), f"no name of a file: {why}") from None


def _check(path: PathLike, found: os.stat_result, max_bytes: int | None) -> int:
    if kind := describe_file_kind(found.st_mode):
        raise UnfitFile(path, f"{kind}, not a regular file")
    if max_bytes is not None and found.st_size > max_bytes:
        raise _too_large(path, found.st_size, max_bytes)
    return found.st_size


def _too_large(path: PathLike, size: int, max_bytes: int) -> UnfitFile:
    return UnfitFile(path, f"{size:,} bytes, more than the {max_bytes:,} that are read of such a file")


def open_regular(path: PathLike, max_bytes: int | None = None) -> BinaryIO:
    """Open a regular file for reading bytes.

    Raises:
        UnfitFile: see `check_regular`; also if the file is replaced by something else meanwhile.
    """
    check_regular(path, max_bytes)
    # Without O_NONBLOCK, opening would block if a pipe had replaced the file; it has no effect on regular files.
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    try:
        _check(path, os.fstat(handle), max_bytes)
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


class _Pipe(io.FileIO):
    """A pipe that remembers the result of the last read: 0 without a writer, None if no byte has come yet."""

    last: int | None = None

    def readinto(self, buffer: Any) -> int | None:
        self.last = super().readinto(buffer)
        return self.last


def open_stream(path: PathLike, patience: float = PIPE_TIMEOUT, *, max_bytes: int | None = None) -> BinaryIO:
    """Open a regular file or a pipe for reading once from beginning to end, as for `--input <(zcat corpus.gz)`.

    Args:
        path: the file or pipe.
        patience: seconds to wait for a writer of a named pipe.
        max_bytes: maximum size of a regular file; None for any size.

    Raises:
        UnfitFile: the path is something else, the file is larger, or the named pipe has no writer in time.
    """
    if not stat.S_ISFIFO(_stat(path).st_mode):
        return open_regular(path, max_bytes)
    named = not os.path.basename(os.path.realpath(path)).startswith("pipe:[")
    pipe = _Pipe(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))
    file = io.BufferedReader(pipe, 1 << 20)
    deadline = time.monotonic() + patience
    while not file.peek(1) and pipe.last == 0 and named:
        if time.monotonic() > deadline:
            file.close()
            raise UnfitFile(path, "a named pipe into which nobody writes")
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
        UnfitFile: see `check_regular`; also if the file grows, or is larger than its reported size.
    """
    with open_stream(path, max_bytes=max_bytes) if pipes else open_regular(path, max_bytes) as file:
        data = file.read(min(max_bytes, os.fstat(file.fileno()).st_size) + 1)
        # One byte more than the reported size, which is 0 for files in /proc and too small for a growing file.
        data += file.read(max(0, max_bytes + 1 - len(data)))
    if len(data) > max_bytes:
        raise _too_large(path, len(data), max_bytes)
    return data


def read_text(path: PathLike, max_bytes: int, *, pipes: bool = False) -> str:
    """Return a regular file of text in UTF-8.

    Args:
        path: the file.
        max_bytes: maximum size.
        pipes: the path may also be a pipe, see `open_stream`.

    Raises:
        UnfitFile: see `read_bytes`.
        UnicodeDecodeError: the bytes are not UTF-8; a ValueError.
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
        parse_int: converts the digits of a whole number; default `int`.

    Raises:
        ValueError: the text is not JSON, is nested too deeply, or has too long numbers or more than `MAX_VALUES` values.
    """
    try:
        text = text if isinstance(text, str) else text.decode("utf-8-sig")
        if count_values(text) > MAX_VALUES:
            raise ValueError(f"it holds more than {MAX_VALUES:,} values")
        value = json.loads(text, parse_int=parse_int)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except ValueError as error:
        if "integer string conversion" in str(error):
            raise ValueError(f"a number in it has more than {sys.get_int_max_str_digits()} digits") from None
        raise
    if _deeper(value, MAX_DEPTH):
        raise ValueError("it is nested too deeply")
    return value


def count_values(text: str) -> int:
    """Return about how many values a JSON text has, before it is parsed.

    It counts one for each bracket and comma; strings may hold a few as well, and are looked at only where that matters.
    """
    found = sum(map(text.count, "[{,"))
    if found <= MAX_VALUES:
        return found
    return sum(map(STRING.sub("", text.replace("\\\\", "").replace('\\"', "")).count, "[{,"))


def _deeper(value: Any, levels: int) -> bool:
    """Return whether a JSON value is nested deeper than this; then nothing can print it, which recurses."""
    held = [value] if isinstance(value, dict | list) else []
    for _ in range(levels):
        inner = (item for outer in held for item in (outer.values() if isinstance(outer, dict) else outer))
        held = [item for item in inner if isinstance(item, dict | list)]
        if not held:
            return False
    return bool(held)
