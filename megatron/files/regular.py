"""Read files that somebody else may have made: regular ones only, of a size that is known and bounded before the first byte.

A name can belong to a pipe, which waits for ever, to a device without an end, to a directory, or to a file larger than the
memory. Every reader goes through here, or asks `check_regular` before it hands a name to a library. What is refused is an
OSError that says what the name is, so that a handler of files that are not there also covers these.
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
MAX_DEPTH = 200  # of brackets in JSON
MAX_VALUES = 10_000_000  # in a JSON text; an empty list has 2 bytes there and 64 in memory
STRING = re.compile(r'"[^"]*+"?')  # where no quote is escaped
PIPE_TIMEOUT = 5.0  # seconds that a named pipe may wait for somebody who writes into it

KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


class UnfitFile(OSError):
    """A name that belongs to no regular file, or to one that is too large. `strerror` says which, without the name."""

    def __init__(self, path: PathLike, what: str) -> None:
        super().__init__(errno.EINVAL, what, os.fspath(path))

    def __str__(self) -> str:
        return f"{self.filename}: {self.strerror}"


def error_reason(error: BaseException) -> str:
    """Return why a file cannot be read, in words, without its name and without the system's number of the error."""
    return str(getattr(error, "strerror", None) or error or type(error).__name__)


def describe_file_kind(mode: int) -> str:
    """Return the kind of file that an `st_mode` says, in words; "" for a regular one."""
    if stat.S_ISREG(mode):
        return ""
    return next((words for test, words in KINDS if test(mode)), "something else")


def check_regular(path: PathLike, max_bytes: int | None = None) -> int:
    """Return the size in bytes of a regular file, links followed. Nothing is opened: opening a device can have effects.

    Raises:
        UnfitFile: it is something else, or has more than `max_bytes`.
        OSError: as of `os.stat`, where there is no such file.
    """
    return _check(path, _stat(path), max_bytes)


def _stat(path: PathLike) -> os.stat_result:
    """Return `os.stat` of a path, with words of our own for links that lead nowhere and for null bytes."""
    try:
        return os.stat(path)
    except FileNotFoundError:
        if os.path.islink(path):
            what = f"a link to {os.readlink(path)}, which is not there"
            raise FileNotFoundError(errno.ENOENT, what, os.fspath(path)) from None
        raise
    except ValueError as error:
        why = "it holds a null byte" if "\0" in os.fsdecode(path) else error  # Python's own words differ between versions
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
        UnfitFile: as of `check_regular`, also where the name comes to stand for something else meanwhile.
    """
    check_regular(path, max_bytes)
    # Without O_NONBLOCK a pipe that took the file's place would make this wait; regular files do not heed it.
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    try:
        _check(path, os.fstat(handle), max_bytes)
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


class _Pipe(io.FileIO):
    """A pipe that remembers what the last read gave: 0 where nobody writes, None where no byte has come yet."""

    last: int | None = None

    def readinto(self, buffer: Any) -> int | None:
        self.last = super().readinto(buffer)
        return self.last


def open_stream(path: PathLike, patience: float = PIPE_TIMEOUT, *, max_bytes: int | None = None) -> BinaryIO:
    """Open a regular file or a pipe for reading once, from its beginning to its end: `--input <(zcat corpus.gz)`.

    Args:
        path: of the file or pipe.
        patience: seconds to wait for somebody who writes into a named pipe.
        max_bytes: the most that a regular file may have; None for any size.

    Raises:
        UnfitFile: it is something else, larger, or a named pipe into which nobody writes in time.
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
        path: of the file.
        max_bytes: the most that it may have.
        pipes: it may be a pipe as well, as for `open_stream`.

    Raises:
        UnfitFile: as of `check_regular`, also for a file that grows or that says it is smaller.
    """
    with open_stream(path, max_bytes=max_bytes) if pipes else open_regular(path, max_bytes) as file:
        data = file.read(min(max_bytes, os.fstat(file.fileno()).st_size) + 1)
        # One byte more than it says: a file of /proc says 0, and one that somebody appends to grows.
        data += file.read(max(0, max_bytes + 1 - len(data)))
    if len(data) > max_bytes:
        raise _too_large(path, len(data), max_bytes)
    return data


def read_text(path: PathLike, max_bytes: int, *, pipes: bool = False) -> str:
    """Return a regular file of text in UTF-8.

    Args:
        path: of the file.
        max_bytes: the most that it may have.
        pipes: it may be a pipe as well, as for `open_stream`.

    Raises:
        UnfitFile: as of `read_bytes`.
        UnicodeDecodeError: the bytes are not UTF-8; a ValueError.
    """
    return read_bytes(path, max_bytes, pipes=pipes).decode("utf-8")


def read_json(path: PathLike, max_bytes: int = MAX_SETTINGS_BYTES) -> Any:
    """Return the value of a JSON file.

    Raises:
        UnfitFile: as of `read_bytes`.
        ValueError: it is no JSON; the message says why.
    """
    return parse_json(read_bytes(path, max_bytes))


def parse_json(text: str | bytes, parse_int: Callable[[str], Any] | None = None) -> Any:
    """Return the value of a JSON text.

    Args:
        text: the text, or its bytes in UTF-8.
        parse_int: makes whole numbers of their digits; default `int`.

    Raises:
        ValueError: it is no JSON, is nested too deeply, has endless numbers or more than `MAX_VALUES` values.
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
