"""How a process of a job ends after a failure: what it says, its exit status, and whether the error was its own."""

from __future__ import annotations

import os
import signal
import sys
import threading
from contextlib import suppress

import torch.distributed as dist

ECHOES = ("gloo", "nccl", "connection closed by peer", "connection reset by peer", "broken pipe")


def status_of(error: BaseException) -> int:
    """The exit status of a process that ends with this error."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    return 128 + signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1


def say(text: str) -> None:
    """Write what is in the buffers, then the text to stderr in one piece. Takes two seconds at most."""

    def write() -> None:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        with suppress(OSError):
            os.write(2, text.encode(errors="replace"))

    # Nobody may read the other end, or the main thread may hold a stream's lock for ever.
    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    writer.join(2.0)


def is_echo(error: BaseException) -> bool:
    """Whether an error may only show that another rank failed: torch's errors of communication, and their text."""
    cause: BaseException | None = error
    while cause is not None:
        text = str(cause).lower()
        if isinstance(cause, dist.DistError) or (isinstance(cause, RuntimeError) and any(e in text for e in ECHOES)):
            return True
        cause = cause.__cause__
    return False
