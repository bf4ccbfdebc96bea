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

FIRST_RANK_SECONDS = 10.0  # by which rank 0 may be slower to its message than the others
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

    run_briefly(write)  # nobody may read the other end, or the main thread may hold a stream's lock for ever


def run_briefly(work: Callable[[], object]) -> None:
    """Run something that may never end, for five seconds at most."""
    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    worker.join(5.0)


def let_rank_0_report(env: LaunchEnvironment) -> None:
    """Wait, on a rank other than the first, until the first has said what is wrong with the command that all have.

    A launcher ends all processes when one leaves, so that must not be before the first one has spoken. One that is torchrun
    reports each that does not end with 0, so this process then does.
    """
    exit_0_on_sigterm(env)
    time.sleep(1.0 if env.job is None else FIRST_RANK_SECONDS)


def exit_0_on_sigterm(env: LaunchEnvironment) -> None:
    """Make this process end with 0 where torchrun ends it, since another one has failed and speaks for all."""
    if env.job is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda number, frame: os._exit(0))


def write_error_file(text: str) -> None:
    """Leave the root cause where torchrun looks for it, so that its own report names it too. Other launchers get nothing.

    The format is that of torch.distributed.elastic's error files. Of a failure only the lines that name it: torchrun shows the
    file of each rank that it found dead, and one traceback is enough.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    lines = text.strip().splitlines()
    words = "\n".join([line for line in lines if line.startswith("error: ")] or lines)
    if path and words:
        extra = {"py_callstack": words, "timestamp": str(int(time.time()))}
        with suppress(OSError):
            Path(path).write_text(json.dumps({"message": {"message": words, "extraInfo": extra}}), encoding="utf-8")


def is_secondary_error(error: BaseException) -> bool:
    """Return whether an error may only show that another rank failed.

    Such are torch's errors of communication, known by their class or by their text.
    """
    cause: BaseException | None = error
    # torch wraps some errors, so the causes are looked at too.
    while cause is not None:
        text = str(cause).lower()
        # By its name, because a process can end before it has imported torch.
        of_torch = any(kind.__name__ == "DistError" for kind in type(cause).__mro__)
        if of_torch or (isinstance(cause, RuntimeError) and any(words in text for words in COMMUNICATION_WORDS)):
            return True
        cause = cause.__cause__
    return False
