"""Errors that end a job before its work begins, and the types of functions that turn errors into messages."""

from __future__ import annotations

from collections.abc import Callable

# Given an error, and its rank, host and phase as text, returns its message; None if the error needs a traceback.
Explain = Callable[[BaseException, str], str | None]
# Given a signal's name and the rank, returns message and exit status of a job that the signal ends before it can save.
DescribeEarlyStop = Callable[[str, int], tuple[str, int]]


class JobError(Exception):
    """The processes cannot work together; the message says why, and no traceback is shown.

    Attributes:
        status: the exit status; 2 if the user must change the command or a host.
    """

    def __init__(self, text: str, status: int = 1) -> None:
        super().__init__(text)
        self.status = status


class InputError(Exception):
    """A file or setting of the command cannot be used; the message says why. Raised before the ranks have joined; status 2."""

    status = 2
