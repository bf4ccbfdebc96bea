"""Run a job of several ranks: each prepares its inputs alone, then all work together. One rank reports an error."""

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
    early_stop: EarlyStop,
    *,
    save: str | None = None,
    compiled: bool = False,
) -> int:
    """Call `prepare` on each rank alone, form the process group, and call `run` on all ranks.

    A job of one process raises its error. With several ranks, one rank reports an error, and all processes end.

    Args:
        prepare: builds this rank's inputs without the other ranks; raises InputError.
        run: does the work of all ranks; returns the exit status.
        layout: contains the timeouts, and the backend of the process group.
        env: this process's launch environment.
        signals: the signals that ask the job to stop.
        early_stop: returns message and exit status of a job that is stopped before it can save.
        save: the directory to lock for this job; None locks nothing.
        compiled: layers are compiled, so the watchdog does not limit the first action of each kind, which compiles.

    Returns:
        The exit status of `run`.
    """
    hang = layout.hang_timeout_seconds or math.inf
    timeouts = WatchdogTimeouts(hang=hang, first=math.inf if compiled else hang)
    timeout = layout.distributed_timeout_minutes
    log = partial(print_lines, sys.stdout if env.rank == 0 else None)
    with (
        guarded(
            env, timeout, explain=explain_error, timeouts=timeouts, signals=signals, describe_early_stop=early_stop
        ) as guard,
        hold_lock(save, guard, env, log) as record_ranks,
    ):
        prepared = prepare(guard.watch)
        # Wait before the process group forms: a rank that fails afterwards would leave the others waiting in a collective.
        guard.wait_for_all("preparing their data", log)
        record_ranks()
        with job(env, layout.distributed_backend, timeout, guard=guard) as joined:
            return run(prepared, joined)


def report_errors(work: Callable[[], int], env: LaunchEnvironment) -> int:
    """Run `work` and return its exit status. If it raises an error, report it on stderr and return the status of that.

    Args:
        work: runs the job, by `run_in_job`.
        env: this process's launch environment.
    """
    try:
        return work()
    except KeyboardInterrupt:
        return print_error("interrupted", 130, env.rank == 0)
    except (InputError, JobError) as error:
        write_error_file(f"error: {error}")
        return print_error(f"error: {error}", error.status)
    except Exception as error:  # with several ranks, the watchdog reports all errors after its start
        where = f"rank {env.rank} on host {os.uname().nodename}"
        message = explain_error(error, where)
        text = f"error: {message}" if message else f"error: {where}: {type(error).__name__}: {error}"
        write_error_file(text)
        return print_error(text if message else traceback.format_exc() + text, exit_status(error))


def refuse_on_all(error: ConfigError, env: LaunchEnvironment, minutes: float) -> bool:
    """End the job with the mistakes that this rank has found in the command, which rank 0 reports once.

    Args:
        error: the mistakes that this rank has found.
        env: this process's launch environment.
        minutes: how long to wait for rank 0.

    Returns:
        False if rank 0 cannot be reached; otherwise it does not return.
    """
    exit_0_on_sigterm(env)
    try:
        with guarded(env, minutes, explain=explain_error), as_input_error():
            raise error
    except JobError:
        return False


def explain_error(error: BaseException, where: str) -> str | None:
    """Return the message of an error that needs no traceback; None for any other error.

    Args:
        error: the exception.
        where: rank, host and phase, which precede the message of an error that may be of this rank alone.
    """
    if isinstance(error, TrainingError | CheckpointError):  # raised by all ranks alike, so no rank is named
        return str(error)
    if isinstance(error, DataError | InputError):
        return f"{where}: {error}"
    memory = out_of_memory_message(error)
    return f"{where}: {memory}; {LOWER_MEMORY}" if memory else None


def print_error(message: str, status: int, is_reporter: bool = True) -> int:
    """Print an error message to stderr, and return the exit status.

    Args:
        message: the message.
        status: the exit status to return.
        is_reporter: false on a rank whose message another rank prints.
    """
    if is_reporter:
        print(message, file=sys.stderr, flush=True)
    return status


@contextmanager
def as_input_error() -> Iterator[None]:
    """Turn a ConfigError, DataError or CheckpointError raised inside the block into an InputError."""
    try:
        yield
    except ConfigError as error:
        raise InputError("\nerror: ".join(map(str, error.problems))) from error
    except (DataError, CheckpointError) as error:
        raise InputError(str(error)) from error


def print_lines(out: TextIO | None, *lines: str | None) -> None:
    """Print and flush the lines that are not None. Print nothing if `out` is None, as it is on all ranks but the first."""
    for line in lines:
        if out is not None and line is not None:
            print(line, file=out, flush=True)
