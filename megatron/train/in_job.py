"""Run a job: each rank prepares by itself, then all work together; an error is reported once, by one rank."""

from __future__ import annotations

import math
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TextIO, TypeVar

from megatron.checkpoint.layout import CheckpointError
from megatron.config.errors import ConfigError
from megatron.config.schema import LayoutConfig
from megatron.data.errors import DataError
from megatron.launch.environment import LaunchEnvironment
from megatron.launch.errors import InputError, JobError
from megatron.launch.exit_report import exit_0_on_sigterm, exit_status, write_error_file
from megatron.launch.heartbeat import WatchdogTimeouts
from megatron.launch.job import Job, guarded, job
from megatron.launch.memory import out_of_memory_message
from megatron.launch.signals import StopSignals
from megatron.launch.watchdog import Watchdog
from megatron.plan.enough_memory import LOWER_MEMORY
from megatron.train.errors import TrainingError
from megatron.train.lock import hold_lock
from megatron.train.progress import EarlyStop

T = TypeVar("T")


def run_in_job(
    prepare: Callable[[Watchdog], T],
    run: Callable[[T, Job], int],
    layout: LayoutConfig,
    env: LaunchEnvironment,
    signals: StopSignals,
    early: EarlyStop,
    *,
    save: str | None = None,
    compiled: bool = False,
) -> int:
    """Prepare on each rank by itself, then run on all together.

    An error of a single process is raised; of several ranks one reports it, and all end.

    Args:
        prepare: makes what this rank needs, without the others; raises InputError.
        run: the work of all ranks; returns the exit status.
        layout: timeouts and backend of the process group.
        env: the launcher's description of this process.
        signals: what asks the job to stop.
        early: the end of a job that is stopped before the ranks have joined.
        save: the directory that is this job's alone meanwhile.
        compiled: the first work of a kind may take any time, since it is compiled.

    Returns:
        The exit status of `run`.
    """
    hang = layout.hang_timeout_seconds or math.inf
    timeouts = WatchdogTimeouts(hang=hang, first=math.inf if compiled else hang)
    timeout = layout.distributed_timeout_minutes
    tell = partial(print_lines, sys.stdout if env.rank == 0 else None)
    with (
        guarded(env, timeout, explain=explain_error, timeouts=timeouts, signals=signals, early=early) as guard,
        hold_lock(save, guard, env, tell) as joined,
    ):
        prepared = prepare(guard.watch)
        # Before the process group forms, in which a rank that failed would leave the others waiting.
        guard.wait_for_all("preparing their data", tell)
        joined()
        with job(env, layout.distributed_backend, timeout, guard=guard) as started:
            return run(prepared, started)


def report_errors(work: Callable[[], int], env: LaunchEnvironment) -> int:
    """Return the exit status of `work`, or of the error that ended it, which is reported on stderr.

    Args:
        work: a job; `run_in_job`.
        env: the launcher's description of this process.
    """
    try:
        return work()
    except KeyboardInterrupt:
        return print_error("interrupted", 130, env.rank == 0)
    except (InputError, JobError) as error:
        write_error_file(f"error: {error}")
        return print_error(f"error: {error}", error.status)
    except Exception as error:  # of several ranks only what no watch saw: they did not find one another
        where = f"rank {env.rank} on host {os.uname().nodename}"
        words = explain_error(error, where)
        text = f"error: {words}" if words else f"error: {where}: {type(error).__name__}: {error}"
        write_error_file(text)
        return print_error(text if words else traceback.format_exc() + text, exit_status(error))


def refuse_on_all(error: ConfigError, env: LaunchEnvironment, minutes: float) -> bool:
    """End all ranks with what this one has found; does not return then. False where there is no first rank to tell it to.

    Args:
        error: the mistakes.
        env: of this process.
        minutes: to wait for the first rank.
    """
    exit_0_on_sigterm(env)
    try:
        with guarded(env, minutes, explain=explain_error), as_input_error():
            raise error
    except JobError:
        return False


def explain_error(error: BaseException, where: str) -> str | None:
    """Return the words for an error that needs no traceback; None for any other.

    Args:
        error: the exception.
        where: rank, host and phase, for an error that may be this rank's alone.
    """
    if isinstance(error, TrainingError | CheckpointError):  # the same on all ranks
        return str(error)
    if isinstance(error, DataError | InputError):
        return f"{where}: {error}"
    memory = out_of_memory_message(error)
    return f"{where}: {memory}; {LOWER_MEMORY}" if memory else None


def print_error(message: str, status: int, speak: bool = True) -> int:
    """Print an error message to stderr, and return the exit status.

    Args:
        message: the whole message.
        status: the exit status to return.
        speak: false on a rank that leaves the message to another.
    """
    if speak:
        print(message, file=sys.stderr, flush=True)
    return status


@contextmanager
def as_input_error() -> Iterator[None]:
    """Turn errors of a setting, of data or of a checkpoint inside the block into InputError."""
    try:
        yield
    except ConfigError as error:
        raise InputError("\nerror: ".join(map(str, error.problems))) from error
    except (DataError, CheckpointError) as error:
        raise InputError(str(error)) from error


def print_lines(out: TextIO | None, *lines: str) -> None:
    """Print lines at once; nothing where this rank has no output."""
    for line in lines:
        if out is not None:
            print(line, file=out, flush=True)
