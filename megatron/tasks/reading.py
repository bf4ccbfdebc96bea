"""Read the files of tasks, with error messages that name the file and the place in it.

A place is a line, `dev.tsv:12`, or the path of a value in a JSON file, `train.json: data[3].paragraphs[0].context`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron.data.corpus import describe_utf8_error, json_type_name, open_text
from megatron.data.errors import DataError
from megatron.data.packed import BLOCK_BYTES, DAMAGE_ERRORS, damaged_error
from megatron.files.regular import MAX_TASK_JSON_BYTES, MAX_TEXT_BYTES, check_regular, error_reason, parse_json

MAX_VALUE_LENGTH = 60  # characters of a wrong value in a message


def read_task_text(file: str, max_bytes: int = MAX_TEXT_BYTES) -> str:
    """Read a whole text file, which may be compressed, without its byte-order mark.

    Raises:
        DataError: the file cannot be read, is damaged, is not UTF-8, or has more than `max_bytes` after decompression.
    """
    try:
        check_regular(file, max_bytes)
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error_reason(error)})") from error
    data = bytearray()  # decompressed bytes, which the limit counts, since a small file can expand to very many
    with open_text(file) as stream:
        try:
            while len(data) <= max_bytes and (block := stream.read(BLOCK_BYTES)):
                data += block
        except DAMAGE_ERRORS as error:
            raise damaged_error(file, data.count(b"\n"), error) from error
    if len(data) > max_bytes:
        raise DataError(f"{file}: has more than {max_bytes:,} bytes, the limit for such a file")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{file}:{line}: {describe_utf8_error(error)}") from error


def read_json_value(file: str, form: str) -> JsonValue:
    """Read a file that is one JSON value; DataError if it is not. form: description of the expected content, for messages."""
    text = read_task_text(file, MAX_TASK_JSON_BYTES)
    try:
        return JsonValue(file, "", parse_json(text), form)
    except ValueError as error:
        raise DataError(f"{file}: it is not JSON: {error}; expected {form}") from error


@dataclass(frozen=True)
class JsonValue:
    """A value of a JSON file.

    Attributes:
        file: name of the file.
        place: path of the value in the file, as in `data[3].context`; empty for the whole file.
        content: the value as parsed by `json`.
        form: description of the file's expected content, for messages.
    """

    file: str
    place: str
    content: Any
    form: str

    def error(self, problem: str) -> DataError:
        """Return an error whose message is the place of this value and the problem."""
        where = f"{self.file}: {self.place}" if self.place else self.file
        return DataError(f"{where}: {problem}")

    def require_type(self, required: type, description: str) -> Any:
        """Return the content; DataError if it does not have the required type, described in the message."""
        if isinstance(self.content, required):
            return self.content
        found = json_type_name(self.content)
        value = f" {self._abbreviated()}" if found in ("a number", "text", "true or false") else ""
        raise self.error(f"it is {found}{value}, not {description}; expected {self.form}")

    def __contains__(self, key: str) -> bool:
        return key in self.require_type(dict, "an object")

    def __getitem__(self, key: str) -> JsonValue:
        """Return the value under a key of an object; DataError if it is missing."""
        members = self.require_type(dict, "an object")
        if key not in members:
            keys = ", ".join(json.dumps(name)[1:-1] for name in list(members)[:8]) or "none"
            raise self.error(f"it has no `{key}` (its keys: {keys}); expected {self.form}")
        return JsonValue(self.file, f"{self.place}.{key}".lstrip("."), members[key], self.form)

    def items(self) -> Iterator[JsonValue]:
        """Return the values of a list, in order."""
        elements = self.require_type(list, "a list")
        return (JsonValue(self.file, f"{self.place}[{n}]", element, self.form) for n, element in enumerate(elements))

    def text(self) -> str:
        """Return the content, a string; DataError for another type, or an unpaired surrogate, which tokenizers refuse."""
        text: str = self.require_type(str, "text")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            surrogate = f"\\u{ord(text[error.start]):04x}"
            problem = f"it contains half of a surrogate pair, {surrogate} at character {error.start}: {self._abbreviated()}"
            raise self.error(problem) from error
        return text

    def boolean(self) -> bool:
        """Return the content, a boolean; DataError for another type."""
        return bool(self.require_type(bool, "true or false"))

    def integer(self, largest: int) -> int:
        """Return the content, an integer from 0 to `largest`; DataError for anything else."""
        if type(self.content) is not int or not 0 <= self.content <= largest:
            raise self.error(f"it is {self._abbreviated()}, not a whole number from 0 to {largest}")
        return self.content

    def _abbreviated(self) -> str:
        """Return the beginning of the value as JSON, for a message."""
        text = json.dumps(self.content)  # ASCII only
        return text if len(text) <= MAX_VALUE_LENGTH else f"{text[:MAX_VALUE_LENGTH]}..."
