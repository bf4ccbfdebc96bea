"""Read the fields of a request, with an error message that names an invalid one."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

MAX_MESSAGE = 2000  # characters of an error message, which may quote the client's text
MAX_LINE = 300  # characters of each part of a log line
MAX_INTEGER = 2**63 - 1  # upper limit of fields without one, so that an error message can quote the number


class RequestError(ValueError):
    """A request cannot be answered.

    Attributes:
        param: the name of the invalid field; None for none.
        status: the HTTP status.
        code: OpenAI's code of the error, for programs; None for none.
    """

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str | None = None) -> None:
        super().__init__(message if len(message) <= MAX_MESSAGE else f"{message[:MAX_MESSAGE]}...")
        param = param if param is None else param[:MAX_MESSAGE]
        self.param, self.status, self.code = param, status, code

    def body(self) -> dict[str, Any]:
        """Return the error in the form of OpenAI's API."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


class Fields:
    """The fields of a request, a JSON object; null counts as absent.

    RequestError if the body is not a JSON object, or names a field twice at any depth, since JSON does not define which counts.

    Attributes:
        values: the values of the fields, by name.
    """

    def __init__(self, body: bytes) -> None:
        try:
            held = json.loads(body, object_pairs_hook=_distinct)
            json.dumps(held, ensure_ascii=False).encode()  # fails for half of a surrogate pair, which is JSON but not text
        except RequestError:
            raise
        except (ValueError, RecursionError) as error:
            raise RequestError(f"the request's body is no JSON: {error}") from error
        if not isinstance(held, dict):
            raise RequestError("the request's body is no JSON object")
        self.values: Mapping[str, Any] = {name: value for name, value in held.items() if value is not None}

    def only(self, known: frozenset[str]) -> None:
        """Raise RequestError for an unknown field, since a misspelt one would be ignored silently."""
        for name in self.values.keys() - known:
            raise RequestError(f"{name} is no field of this request; there are {', '.join(sorted(known))}", name)

    def integer(self, name: str, default: int, low: int, high: int | None = None) -> int:
        """Return an integer.

        Args:
            name: name of the field.
            default: the value of an absent field.
            low: the minimum.
            high: the maximum; None for no limit.

        Raises:
            RequestError: the value is anything else.
        """
        value = self.values.get(name, default)
        # A bool is an int for isinstance, and true is no number.
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
            above: `low` itself is not allowed.

        Raises:
            RequestError: the value is anything else.
        """
        value = self.values.get(name, default)
        legal = type(value) in (int, float) and low <= value <= high and not (above and value == low)
        if not legal:
            raise RequestError(f"{name} must be a number {'above' if above else 'from'} {low:g} to {high:g}", name)
        return float(value)

    def boolean(self, name: str, default: bool = False) -> bool:
        """Return true or false; RequestError for anything else."""
        value = self.values.get(name, default)
        if not isinstance(value, bool):
            raise RequestError(f"{name} must be true or false", name)
        return value

    def text(self, name: str, default: str) -> str:
        """Return a string; RequestError for anything else."""
        value = self.values.get(name, default)
        if not isinstance(value, str):
            raise RequestError(f"{name} must be a string", name)
        return value


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the object of these fields; RequestError where two have one name."""
    held = dict(pairs)
    if len(held) < len(pairs):
        names = Counter(name for name, _ in pairs)
        twice = next(name for name, count in names.items() if count > 1)
        raise RequestError(f"the request's body holds the field {twice!r} more than once", twice)
    return held


def one_line(text: str) -> str:
    """Return the text as a part of one line of the log, since it may quote what a client sent."""
    return "".join(c if c.isprintable() else "?" for c in text[:MAX_LINE])
