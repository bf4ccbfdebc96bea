"""Errors that end a job before its work begins, and the types of functions that turn errors into messages."""

from __future__ import annotations

from collections.abc import Callable

# Returns the message of an error, given the error and its rank, host and phase; None for one that needs its traceback.
Explain = Callable[[BaseException, str], str | None]
# Returns message and exit status of a job that a signal ends before it can save, given the signal's name and the rank.
Early = Callable[[str, int], tuple[str, int]]


class JobError(Exception):
    """The processes cannot work together; the message says why, and no traceback is shown.

    Attributes:
        status: the exit status; 2 if the command or a host must change.
    """

    def __init__(self, text: str, status: int = 1) -> None:
        super().__init__(text)
        self.status = status


class InputError(Exception):
    """A file or setting of the command cannot be used; the message says why. Found before any process group; exit status 2."""

    status = 2
