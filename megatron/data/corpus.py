"""Read text from files of JSON lines: open the files, read their lines, and take the text from a line."""

from __future__ import annotations

import codecs
import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any

from megatron.data.errors import DataError
from megatron.data.packed import BLOCK_BYTES, DAMAGE_ERRORS, damaged_error, open_unpacked
from megatron.files.regular import MAX_LINE_BYTES, error_reason, open_regular, open_stream, parse_json

ARRAY_ERROR = "a JSON array, not JSON lines; write one object per line, as `jq -c '.[]' %s` does"
JSON_TYPES = ((bool, "true or false"), (str, "text"), (int | float, "a number"), (list, "a list"), (dict, "an object"))


@dataclass(frozen=True)
class Line:
    """One unparsed line of a corpus. number: its line number, from 1."""

    file: str
    number: int
    text: bytes


class BadLine(Exception):
    """A line that is not a valid document; the message names file and line."""


def expand_globs(patterns: Sequence[str]) -> list[str]:
    """Return the files that these names and globs match, sorted for each glob; DataError if one matches no file."""
    files: list[str] = []
    for pattern in patterns:
        found = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
        if not found:
            raise DataError(f"--input {pattern}: no such file")
        for file in found:
            if os.path.isdir(file):
                raise DataError(f"--input {file}: a directory; name its files, as in {os.path.join(file, '*.jsonl')}")
        files += found
    return files


def open_text(file: str, *, pipes: bool = False) -> IO[bytes]:
    """Open a file for reading bytes, decompressed if it is compressed. pipes: the file may also be a pipe.

    Raises DataError if the file cannot be read or is not text, see `open_unpacked`.
    """
    try:
        stream = open_stream(file) if pipes else open_regular(file)
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error_reason(error)})") from error
    try:
        return open_unpacked(file, stream)
    except BaseException:
        stream.close()
        raise


def read_blocks(files: Sequence[str], *, pipes: bool = False) -> Iterator[list[Line]]:
    """Yield the lines of all files in order, without blank ones, in lists of about 1 MB. pipes: as in `open_text`.

    Raises DataError if a file is damaged, or if a line is longer than MAX_LINE_BYTES.
    """
    block: list[Line] = []
    size = 0
    for file in files:
        with open_text(file, pipes=pipes) as stream:
            number = 0
            while True:
                try:
                    text = stream.readline(MAX_LINE_BYTES + 1)  # one byte more than allowed, to detect a line that is too long
                except DAMAGE_ERRORS as error:
                    raise damaged_error(file, number, error) from error
                if not text:
                    break
                number += 1
                if len(text) > MAX_LINE_BYTES:
                    limit = f"{MAX_LINE_BYTES:,} bytes"
                    array = f"; if it is a JSON array, write one object per line, as `jq -c '.[]' {file}` does"
                    raise DataError(f"{file}:{number}: a line of more than {limit}; cut it into several documents{array}")
                if text.strip():
                    block.append(Line(file, number, text))
                    size += len(text)
                if size >= BLOCK_BYTES:
                    yield block
                    block, size = [], 0
    if block:
        yield block


def check_keys(keys: Sequence[str]) -> None:
    """Check the keys of --json-keys: DataError if one is empty, or given twice, since each key gets its own dataset."""
    for key in keys:
        if not key:
            raise DataError("--json-keys: a key is empty; name keys of the JSON objects, such as text")
        if keys.count(key) > 1:
            raise DataError(f"--json-keys {' '.join(keys)}: {key} is given {keys.count(key)} times; give each key once")


def parse_line(line: Line, keys: Sequence[str], advice: str = "; choose with --json-keys") -> list[str]:
    """Return the texts under some keys of a line.

    Args:
        line: one line of a corpus.
        keys: keys of the line's JSON object whose values are the texts.
        advice: appended to the message about a missing key.

    Raises:
        BadLine: if the line is not a JSON object, or a key is missing or has no valid text.
    """
    where = f"{line.file}:{line.number}"
    try:
        # Numbers are not used. As floats they may have thousands of digits, which Python's int() refuses.
        document: Any = parse_json(line.text.decode("utf-8-sig"), parse_int=float)
    except UnicodeDecodeError as error:
        raise BadLine(f"{where}: {describe_utf8_error(error)}") from error
    except ValueError as error:
        if line.number == 1 and line.text.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
            raise BadLine(f"{where}: {ARRAY_ERROR % line.file}") from error
        raise BadLine(
            f"{where}: not JSON ({error}); the input must be JSON lines, one object per line such as "
            f'{{"{keys[0]}": "..."}}, plain text is not accepted'
        ) from error
    if isinstance(document, list):
        raise BadLine(f"{where}: {ARRAY_ERROR % line.file}")
    if not isinstance(document, dict):
        raise BadLine(f"{where}: {json_type_name(document)} in JSON, not an object with the key {keys[0]!r}")
    return [_text(document, key, where, advice) for key in keys]


def _text(document: dict[str, Any], key: str, where: str, advice: str) -> str:
    """Return the text under a key; BadLine if it is missing, or its value is not text."""
    if key not in document:
        keys = ", ".join(map(repr, list(document)[:8])) or "none"
        parent = next((name for name, value in document.items() if isinstance(value, dict) and key in value), None)
        parent_advice = "" if parent is None else f"; the one within {parent!r} is not read: `jq -c .{parent}` lifts it out"
        raise BadLine(f"{where}: no key {key!r} (the keys are: {keys}){parent_advice or advice}")
    text = document[key]
    if not isinstance(text, str):
        raise BadLine(f"{where}: the value of {key!r} is not text but {json_type_name(text)}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadLine(f"{where}: the text of {key!r} contains half of a surrogate pair ({error.reason})") from error
    return text


def json_type_name(value: object) -> str:
    """Return the name of a JSON value's type, for messages."""
    return next((name for kind, name in JSON_TYPES if isinstance(value, kind)), "null")


def describe_utf8_error(error: UnicodeDecodeError) -> str:
    """Return a description of a UTF-8 error, with the byte offset in the line where it is."""
    # The offset is counted from the start of the line, also if several lines were decoded at once.
    start = error.start - (error.object.rfind(b"\n", 0, error.start) + 1)
    return f"not UTF-8 ({error.reason} at byte {start}); save the file as UTF-8"
