"""Read tasks' files; each message about a wrong one names the file and the place in it.

A place is a line, `dev.tsv:12`, or the way to a value of a JSON file, `train.json: data[3].paragraphs[0].context`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron.data.corpus import json_type_name, not_utf8, open_text
from megatron.data.errors import DataError
from megatron.data.packed import BLOCK_BYTES, DAMAGE_ERRORS, damaged_error
from megatron.files.regular import MAX_TASK_JSON_BYTES, MAX_TEXT_BYTES, check_regular, error_reason, parse_json

MAX_SHOWN = 60  # characters of a wrong value in a message


def read_task_text(file: str, max_bytes: int = MAX_TEXT_BYTES) -> str:
    """Read a whole file of text, unpacked where it is packed, without its byte-order mark.

    DataError where it cannot be read, is damaged, no UTF-8, or has more than `max_bytes` unpacked.
    """
    try:
        check_regular(file, max_bytes)
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error_reason(error)})") from error
    data = bytearray()  # the limit holds for the unpacked bytes, of which a small file can hold very many
    with open_text(file) as stream:
        try:
            while len(data) <= max_bytes and (more := stream.read(BLOCK_BYTES)):
                data += more
        except DAMAGE_ERRORS as error:
            raise damaged_error(file, data.count(b"\n"), error) from error
    if len(data) > max_bytes:
        raise DataError(f"{file}: more than the {max_bytes:,} bytes that are read of such a file")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{file}:{line}: {not_utf8(error)}") from error


def read_value(file: str, form: str) -> Value:
    """Read a file that is one JSON value. form: its expected content, for messages. DataError where it is no JSON."""
    text = read_task_text(file, MAX_TASK_JSON_BYTES)
    try:
        return Value(file, "", parse_json(text), form)
    except ValueError as error:
        raise DataError(f"{file}: it is not JSON: {error}; expected {form}") from error


@dataclass(frozen=True)
class Value:
    """A value of a JSON file.

    Attributes:
        file: its name.
        place: the way to the value, "" for the whole.
        held: the value as `json` reads it.
        form: the expected content of the file, for messages.
    """

    file: str
    place: str
    held: Any
    form: str

    def wrong(self, rule: str) -> DataError:
        """Return the error that says what is wrong with this value. rule: goes on after the value's place."""
        where = f"{self.file}: {self.place}" if self.place else self.file
        return DataError(f"{where}: {rule}")

    def of_kind(self, kind: type, wanted: str) -> Any:
        """Return the value itself; DataError unless it is of this kind. wanted: the kind in words."""
        if isinstance(self.held, kind):
            return self.held
        found = json_type_name(self.held)
        shown = f" {self._shown()}" if found in ("a number", "text", "true or false") else ""
        raise self.wrong(f"it is {found}{shown}, not {wanted}; expected {self.form}")

    def __contains__(self, key: str) -> bool:
        return key in self.of_kind(dict, "an object")

    def __getitem__(self, key: str) -> Value:
        """Return the value under a key of an object. DataError where it has none."""
        held = self.of_kind(dict, "an object")
        if key not in held:
            keys = ", ".join(json.dumps(name)[1:-1] for name in list(held)[:8]) or "none"
            raise self.wrong(f"it has no `{key}` (its keys: {keys}); expected {self.form}")
        return Value(self.file, f"{self.place}.{key}".lstrip("."), held[key], self.form)

    def items(self) -> Iterator[Value]:
        """Return the values of a list, in order."""
        held = self.of_kind(list, "a list")
        return (Value(self.file, f"{self.place}[{n}]", item, self.form) for n, item in enumerate(held))

    def text(self) -> str:
        """Return a text. DataError for another value, and for half of a surrogate pair, which no tokenizer takes."""
        held: str = self.of_kind(str, "text")
        try:
            held.encode("utf-8")
        except UnicodeEncodeError as error:
            half = f"\\u{ord(held[error.start]):04x}"
            rule = f"it holds half of a surrogate pair, {half} at character {error.start}: {self._shown()}"
            raise self.wrong(rule) from error
        return held

    def flag(self) -> bool:
        """Return true or false."""
        return bool(self.of_kind(bool, "true or false"))

    def whole(self, largest: int) -> int:
        """Return a whole number from 0 to `largest`. DataError for any other: a fraction, an infinite or a negative one."""
        if type(self.held) is not int or not 0 <= self.held <= largest:
            raise self.wrong(f"it is {self._shown()}, not a whole number from 0 to {largest}")
        return self.held

    def _shown(self) -> str:
        """Return the beginning of the value as JSON, for a message."""
        shown = json.dumps(self.held)  # in ASCII
        return shown if len(shown) <= MAX_SHOWN else f"{shown[:MAX_SHOWN]}..."
