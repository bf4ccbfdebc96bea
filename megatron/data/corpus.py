"""Read text from JSON lines: files, their lines, and the text in a line."""

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

ARRAY = "a JSON array, not JSON lines; write one object a line, as `jq -c '.[]' %s` does"
JSON_TYPES = ((bool, "true or false"), (str, "text"), (int | float, "a number"), (list, "a list"), (dict, "an object"))


@dataclass(frozen=True)
class Line:
    """One unparsed line of a corpus. number: its line number, from 1."""

    file: str
    number: int
    text: bytes


class BadLine(Exception):
    """A line that is not a document; the message names file and line."""


def expand_globs(patterns: Sequence[str]) -> list[str]:
    """Return the files of these names and globs, each glob's in sorted order; DataError for one without files."""
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
    """Open the bytes of a file, unpacked if it is packed. pipes: a pipe may stand for the file; it is read once.

    Raises DataError for one that cannot be read, and for one that is no text, see `open_unpacked`.
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
    """Yield the lines of all files in order, without blank ones, in lists of about 1 MB. pipes: as `open_text`.

    Raises DataError if a file is damaged, or a line longer than MAX_LINE_BYTES.
    """
    block: list[Line] = []
    size = 0
    for file in files:
        with open_text(file, pipes=pipes) as stream:
            number = 0
            while True:
                try:
                    text = stream.readline(MAX_LINE_BYTES + 1)  # one byte more tells a longer line from the longest
                except DAMAGE_ERRORS as error:
                    raise damaged_error(file, number, error) from error
                if not text:
                    break
                number += 1
                if len(text) > MAX_LINE_BYTES:
                    most = f"{MAX_LINE_BYTES:,} bytes"
                    array = f"; if it is a JSON array, write one object a line, as `jq -c '.[]' {file}` does"
                    raise DataError(f"{file}:{number}: a line of more than {most}; cut it into several documents{array}")
                if text.strip():
                    block.append(Line(file, number, text))
                    size += len(text)
                if size >= BLOCK_BYTES:
                    yield block
                    block, size = [], 0
    if block:
        yield block


def check_keys(keys: Sequence[str]) -> None:
    """Check the keys of --json-keys: DataError for an empty one, and for one that is there twice, as each is a dataset."""
    for key in keys:
        if not key:
            raise DataError("--json-keys: a key is empty; name keys of the JSON objects, such as text")
        if keys.count(key) > 1:
            raise DataError(f"--json-keys {' '.join(keys)}: {key} stands there {keys.count(key)} times; name each key once")


def parse_line(line: Line, keys: Sequence[str], advice: str = "; choose with --json-keys") -> list[str]:
    """Return the texts under some keys of a line.

    Args:
        line: one line of a corpus.
        keys: of its JSON object.
        advice: ends the message about a key that is not there.

    Raises:
        BadLine: if the line is no JSON object, or a key has no valid text.
    """
    where = f"{line.file}:{line.number}"
    try:
        # No number of a corpus is used: of those with thousands of digits, which are JSON as well, Python makes no int.
        document: Any = parse_json(line.text.decode("utf-8-sig"), parse_int=float)
    except UnicodeDecodeError as error:
        raise BadLine(f"{where}: {not_utf8(error)}") from error
    except ValueError as error:
        if line.number == 1 and line.text.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
            raise BadLine(f"{where}: {ARRAY % line.file}") from error
        raise BadLine(
            f"{where}: not JSON ({error}); the input must be JSON lines, one object a line such as "
            f'{{"{keys[0]}": "..."}}, plain text is not accepted'
        ) from error
    if isinstance(document, list):
        raise BadLine(f"{where}: {ARRAY % line.file}")
    if not isinstance(document, dict):
        raise BadLine(f"{where}: {json_type_name(document)} in JSON, not an object with the key {keys[0]!r}")
    return [_text(document, key, where, advice) for key in keys]


def _text(document: dict[str, Any], key: str, where: str, advice: str) -> str:
    """Return the text under a key; BadLine if it is missing, or its value is not text."""
    if key not in document:
        have = ", ".join(map(repr, list(document)[:8])) or "none"
        within = next((name for name, value in document.items() if isinstance(value, dict) and key in value), None)
        lift = "" if within is None else f"; the one within {within!r} is not read: `jq -c .{within}` lifts it out"
        raise BadLine(f"{where}: no key {key!r} (the keys are: {have}){lift or advice}")
    text = document[key]
    if not isinstance(text, str):
        raise BadLine(f"{where}: the value of {key!r} is no text but {json_type_name(text)}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadLine(f"{where}: the text of {key!r} holds half of a surrogate pair ({error.reason})") from error
    return text


def json_type_name(value: object) -> str:
    """Return the name of a JSON value's type, as a message says it."""
    return next((name for kind, name in JSON_TYPES if isinstance(value, kind)), "null")


def not_utf8(error: UnicodeDecodeError) -> str:
    """Return what is wrong with a line, or with the line of a text, that is not UTF-8."""
    # The place is counted from the last line end before it.
    start = error.start - (error.object.rfind(b"\n", 0, error.start) + 1)
    return f"not UTF-8 ({error.reason} at byte {start}); save the file as UTF-8"
