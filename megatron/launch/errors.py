"""What ends a job before its work begins."""

from __future__ import annotations


class JobError(Exception):
    """The processes cannot work together, and its own words say why: no traceback.

    status: the exit status, 2 where the command or a host must change.
    """

    def __init__(self, text: str, status: int = 1) -> None:
        super().__init__(text)
        self.status = status


class InputError(Exception):
    """A file or setting of the command cannot be used; the message says why. Found before any process group; exit status 2."""

    status = 2
