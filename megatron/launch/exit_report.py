"""End a process of a job after a failure: its last message, its exit status, and whether the error was its own.

Imports no torch.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from megatron.launch.environment import LaunchEnvironment

FIRST_RANK_SECONDS = 10.0  # how long the other ranks wait for rank 0's message before they end
COMMUNICATION_WORDS = ("gloo", "nccl", "connection closed by peer", "connection reset by peer", "broken pipe")


def exit_status(error: BaseException) -> int:
    """Return the exit status of a process that ends with this error; an error may carry its own as `status`."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    return 128 + signal.SIGINT if isinstance(error, KeyboardInterrupt) else int(getattr(error, "status", 1))


def write_stderr(text: str) -> None:
    """Flush the buffers, then write the text to stderr in one piece. Takes five seconds at most."""

    def write() -> None:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        with suppress(OSError):
            os.write(2, text.encode(errors="replace"))

    run_briefly(write)  # it may block for ever: nobody reads the other end, or the main thread holds a stream's lock


def run_briefly(work: Callable[[], object]) -> None:
    """Run a function that may block for ever, and wait for it five seconds at most."""
    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    worker.join(5.0)


def let_rank_0_report(env: LaunchEnvironment) -> None:
    """Wait, on a rank other than 0, until rank 0 has reported the mistake in the command.

    A launcher ends all processes when one of them ends, so this one must not end before rank 0's message. torchrun reports
    every process that does not end with 0, so this process ends with 0 when torchrun ends it.
    """
    exit_0_on_sigterm(env)
    time.sleep(1.0 if env.job is None else FIRST_RANK_SECONDS)


def exit_0_on_sigterm(env: LaunchEnvironment) -> None:
    """Make this process end with 0 when torchrun ends it, since another one has failed and reports that."""
    if env.job is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda number, frame: os._exit(0))


def write_error_file(text: str) -> None:
    """Write the error to the file from which torchrun's report takes it; does nothing under other launchers.

    The format is that of torch.distributed.elastic's error files. Only the lines that begin with `error: ` are written, without
    the traceback, since torchrun shows the file of every rank that it found dead.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    lines = text.strip().splitlines()
    message = "\n".join([line for line in lines if line.startswith("error: ")] or lines)
    if path and message:
        extra = {"py_callstack": message, "timestamp": str(int(time.time()))}
        with suppress(OSError):
            Path(path).write_text(json.dumps({"message": {"message": message, "extraInfo": extra}}), encoding="utf-8")


def is_secondary_error(error: BaseException) -> bool:
    """Return whether an error may be only the consequence of another rank's failure.

    These are torch's communication errors, recognized by their class or their text.
    """
    cause: BaseException | None = error
    # torch wraps some errors, so the causes are examined as well.
    while cause is not None:
        text = str(cause).lower()
        # By the name of the class, since the process may not have imported torch yet.
        of_torch = any(kind.__name__ == "DistError" for kind in type(cause).__mro__)
        if of_torch or (isinstance(cause, RuntimeError) and any(words in text for words in COMMUNICATION_WORDS)):
            return True
        cause = cause.__cause__
    return False
