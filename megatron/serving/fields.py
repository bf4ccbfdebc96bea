"""Read and check the fields of a request's JSON body; error messages name the invalid field."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

MAX_MESSAGE_LENGTH = 2000  # maximum characters of an error message, which may quote the client's text
MAX_LOG_LENGTH = 300  # maximum characters of a text in a log line
MAX_INTEGER = 2**63 - 1  # for fields without another upper limit, so that an error message can quote the number


class RequestError(ValueError):
    """A request cannot be answered.

    Attributes:
        param: the name of the invalid field; None if the error concerns no field.
        status: the HTTP status.
        code: OpenAI's identifier of the error, such as `invalid_api_key`; None if there is none.
    """

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str | None = None) -> None:
        super().__init__(message if len(message) <= MAX_MESSAGE_LENGTH else f"{message[:MAX_MESSAGE_LENGTH]}...")
        param = param if param is None else param[:MAX_MESSAGE_LENGTH]
        self.param, self.status, self.code = param, status, code

    def body(self) -> dict[str, Any]:
        """Return the error in the form of OpenAI's API."""
        error_type = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": error_type, "param": self.param, "code": self.code}}


class Fields:
    """The fields of a request's body. A field whose value is null counts as absent.

    Args:
        body: the body, a JSON object.

    Attributes:
        values: the values of the fields, by name.

    Raises:
        RequestError: the body is not a JSON object, or an object in it has a field twice, for which JSON defines no value.
    """

    def __init__(self, body: bytes) -> None:
        try:
            values = json.loads(body, object_pairs_hook=_object_without_duplicates)
            json.dumps(values, ensure_ascii=False).encode()  # fails for unpaired surrogates, which JSON permits
        except RequestError:
            raise
        except (ValueError, RecursionError) as error:
            raise RequestError(f"the request's body is not JSON: {error}") from error
        if not isinstance(values, dict):
            raise RequestError("the request's body is not a JSON object")
        self.values: Mapping[str, Any] = {name: value for name, value in values.items() if value is not None}

    def only(self, known: frozenset[str]) -> None:
        """Raise RequestError for a field that is not known, so that a misspelt one is not silently ignored."""
        for name in self.values.keys() - known:
            raise RequestError(f"{name} is not a field of this request; its fields are {', '.join(sorted(known))}", name)

    def integer(self, name: str, default: int, low: int, high: int | None = None) -> int:
        """Return an integer.

        Args:
            name: name of the field.
            default: the value of an absent field.
            low: the minimum.
            high: the maximum; None for `MAX_INTEGER`.

        Raises:
            RequestError: the value is not such an integer.
        """
        value = self.values.get(name, default)
        # Not isinstance, since a bool is an int in Python, but true is not a number in JSON.
        if type(value) is not int or not low <= value <= (MAX_INTEGER if high is None else high):
            legal = f"at least {low}" if high is None else f"from {low} to {high}"
            raise RequestError(f"{name} must be a whole number {legal}", name)
        return value

    def number(self, name: str, default: float, low: float, high: float, *, above: bool = False) -> float:
        """Return a number.

        Args:
            name: name of the field.
            default: the value of an absent field.
            low: the minimum.
            high: the maximum.
            above: the value must be above `low`.

        Raises:
            RequestError: the value is not such a number.
        """
        value = self.values.get(name, default)
        legal = type(value) in (int, float) and low <= value <= high and not (above and value == low)
        if not legal:
            raise RequestError(f"{name} must be a number {'above' if above else 'from'} {low:g} to {high:g}", name)
        return float(value)

    def boolean(self, name: str, default: bool = False) -> bool:
        """Return a boolean; RequestError if the value is anything else."""
        value = self.values.get(name, default)
        if not isinstance(value, bool):
            raise RequestError(f"{name} must be true or false", name)
        return value

    def text(self, name: str, default: str) -> str:
        """Return a string; RequestError if the value is anything else."""
        value = self.values.get(name, default)
        if not isinstance(value, str):
            raise RequestError(f"{name} must be a string", name)
        return value


def _object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the names and values of a JSON object as a dict; RequestError if a name occurs twice."""
    values = dict(pairs)
    if len(values) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        duplicate = next(name for name, count in counts.items() if count > 1)
        raise RequestError(f"the request's body has the field {duplicate!r} more than once", duplicate)
    return values


def one_line(text: str) -> str:
    """Return a text from a client made safe for a log line: shortened, with `?` for unprintable characters and line ends."""
    return "".join(c if c.isprintable() else "?" for c in text[:MAX_LOG_LENGTH])
