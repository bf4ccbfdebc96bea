"""Errors that end a job before its work begins."""

from __future__ import annotations

from collections.abc import Callable

# Puts an error in words, given it and where it came up. None where it needs type, text and traceback.
Explain = Callable[[BaseException, str], str | None]
# Returns what a job says that a signal ends before it can save, and its status, given the signal's name and the rank.
Early = Callable[[str, int], tuple[str, int]]


class JobError(Exception):
    """The processes cannot work together; the message says why, and no traceback is shown.

    Attributes:
        status: the exit status, 2 where the command or a host must change.
    """

    def __init__(self, text: str, status: int = 1) -> None:
        super().__init__(text)
        self.status = status


class InputError(Exception):
    """A file or setting of the command cannot be used; the message says why. Found before any process group; exit status 2."""

    status = 2
