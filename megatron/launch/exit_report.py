"""Report the failure of a process: its exit status, its messages, and whether another rank's failure caused it.

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

RANK_0_SECONDS = 10.0  # how long the other ranks wait for rank 0's message before they end
COMMUNICATION_WORDS = ("gloo", "nccl", "connection closed by peer", "connection reset by peer", "broken pipe")


def exit_status(error: BaseException) -> int:
    """Return the exit status of a process that ends with this error; its attribute `status`, if it has one."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    return 128 + signal.SIGINT if isinstance(error, KeyboardInterrupt) else int(getattr(error, "status", 1))


def write_stderr(text: str) -> None:
    """Flush stdout and stderr, then write the text to stderr in one piece. Takes five seconds at most."""

    def write() -> None:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        with suppress(OSError):
            os.write(2, text.encode(errors="replace"))

    run_briefly(write)  # it blocks if nobody reads the other end, or the main thread holds a stream's lock


def run_briefly(work: Callable[[], object]) -> None:
    """Run a function that may block for ever, and wait for it five seconds at most."""
    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    worker.join(5.0)


def let_rank_0_report(env: LaunchEnvironment) -> None:
    """Give rank 0 time to report a mistake in the command, before this other rank ends.

    A launcher ends all processes when one of them fails, so this one must not end before rank 0 has printed its message. Under
    torchrun, which reports every process with another status than 0, SIGTERM ends it with 0.
    """
    exit_0_on_sigterm(env)
    time.sleep(1.0 if env.job is None else RANK_0_SECONDS)


def exit_0_on_sigterm(env: LaunchEnvironment) -> None:
    """Under torchrun, end with status 0 on SIGTERM, since that follows from another process's failure, which is reported."""
    if env.job is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda number, frame: os._exit(0))


def write_error_file(text: str) -> None:
    """Write the error to the file that torchrun includes in its report; do nothing under other launchers.

    The format is that of torch.distributed.elastic's error files. Only lines that begin with `error: ` are written, if any do,
    without the traceback, since torchrun prints the files of all ranks that it found dead.
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
    # torch wraps some errors, so the chain of causes is followed.
    while cause is not None:
        text = str(cause).lower()
        # The class is found by its name, since the process may not have imported torch yet.
        is_torch_error = any(kind.__name__ == "DistError" for kind in type(cause).__mro__)
        if is_torch_error or (isinstance(cause, RuntimeError) and any(words in text for words in COMMUNICATION_WORDS)):
            return True
        cause = cause.__cause__
    return False
