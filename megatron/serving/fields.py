"""Read the fields of a request one by one: a wrong one gives one message that names it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

MAX_MESSAGE = 2000  # characters, since a message may quote what the client sent
MAX_LINE = 300  # characters of a part of a line of the log
MAX_INTEGER = 2**63 - 1  # where a field has no limit of its own: a larger number has too many digits for a message


class RequestError(ValueError):
    """A client asked for something that cannot be done.

    Attributes:
        param: the field at fault.
        status: of HTTP.
        code: a word for programs.
    """

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str | None = None) -> None:
        super().__init__(message if len(message) <= MAX_MESSAGE else f"{message[:MAX_MESSAGE]}...")
        param = param if param is None else param[:MAX_MESSAGE]
        self.param, self.status, self.code = param, status, code

    def body(self) -> dict[str, Any]:
        """Return the error as OpenAI's clients read it."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


class Fields:
    """A JSON object whose fields are asked for by name; null is as good as absent.

    RequestError for a body that is none, and for one that names a field twice, at any depth: which of the two counts would
    depend on who reads it.
    """

    def __init__(self, body: bytes) -> None:
        try:
            held = json.loads(body, object_pairs_hook=_distinct)
            json.dumps(held, ensure_ascii=False).encode()  # half of a surrogate pair is JSON, but no text
        except RequestError:
            raise
        except (ValueError, RecursionError) as error:
            raise RequestError(f"the request's body is no JSON: {error}") from error
        if not isinstance(held, dict):
            raise RequestError("the request's body is no JSON object")
        self.held: Mapping[str, Any] = {name: value for name, value in held.items() if value is not None}

    def only(self, known: frozenset[str]) -> None:
        """Raise RequestError for a field that nobody asks for: a misspelt one would have no effect."""
        for name in self.held.keys() - known:
            raise RequestError(f"{name} is no field of this request; there are {', '.join(sorted(known))}", name)

    def integer(self, name: str, default: int, low: int, high: int | None = None) -> int:
        """Return an integer.

        Args:
            name: of the field.
            default: where it is absent.
            low: the least that is legal.
            high: the largest that is legal; None for no limit.

        Raises:
            RequestError: it is anything else.
        """
        value = self.held.get(name, default)
        # A bool is an int for isinstance, and true is no number.
        if type(value) is not int or not low <= value <= (MAX_INTEGER if high is None else high):
            legal = f"at least {low}" if high is None else f"from {low} to {high}"
            raise RequestError(f"{name} must be a whole number {legal}", name)
        return value

    def number(self, name: str, default: float, low: float, high: float, *, above: bool = False) -> float:
        """Return a number.

        Args:
            name: of the field.
            default: where it is absent.
            low: the least that is legal.
            high: the largest that is legal.
            above: `low` itself is not legal.

        Raises:
            RequestError: it is anything else.
        """
        value = self.held.get(name, default)
        legal = type(value) in (int, float) and low <= value <= high and not (above and value == low)
        if not legal:
            raise RequestError(f"{name} must be a number {'above' if above else 'from'} {low:g} to {high:g}", name)
        return float(value)

    def boolean(self, name: str, default: bool = False) -> bool:
        """Return true or false; RequestError for anything else."""
        value = self.held.get(name, default)
        if not isinstance(value, bool):
            raise RequestError(f"{name} must be true or false", name)
        return value

    def text(self, name: str, default: str) -> str:
        """Return a string; RequestError for anything else."""
        value = self.held.get(name, default)
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
