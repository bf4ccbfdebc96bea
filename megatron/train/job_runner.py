"""Run a job of several ranks: each prepares its inputs alone, then all work together. One rank reports an error, once."""

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
    """Call `prepare` on each rank alone, form the process group, and call `run` on all ranks.

    An error of a single process is raised. With several ranks, one rank reports the error, and all end.

    Args:
        prepare: builds this rank's inputs without the other ranks; raises InputError.
        run: does the work of all ranks; returns the exit status.
        layout: timeouts and backend of the process group.
        env: the launcher's description of this process.
        signals: the signals that ask the job to stop.
        early: ends a job that is stopped before the process group has formed.
        save: the directory to lock for this job; None locks nothing.
        compiled: layers are compiled, so the watchdog sets no limit to the first action of each kind.

    Returns:
        The exit status of `run`.
    """
    hang = layout.hang_timeout_seconds or math.inf
    timeouts = WatchdogTimeouts(hang=hang, first=math.inf if compiled else hang)
    timeout = layout.distributed_timeout_minutes
    log = partial(print_lines, sys.stdout if env.rank == 0 else None)
    with (
        guarded(env, timeout, explain=explain_error, timeouts=timeouts, signals=signals, early=early) as guard,
        hold_lock(save, guard, env, log) as record_ranks,
    ):
        prepared = prepare(guard.watch)
        # Before the process group forms: inside it, a rank that failed to prepare would leave the others waiting.
        guard.wait_for_all("preparing their data", log)
        record_ranks()
        with job(env, layout.distributed_backend, timeout, guard=guard) as started:
            return run(prepared, started)


def report_errors(work: Callable[[], int], env: LaunchEnvironment) -> int:
    """Return the exit status of `work`, or that of the error that ended it, which is reported on stderr.

    Args:
        work: runs the job, by `run_in_job`.
        env: the launcher's description of this process.
    """
    try:
        return work()
    except KeyboardInterrupt:
        return print_error("interrupted", 130, env.rank == 0)
    except (InputError, JobError) as error:
        write_error_file(f"error: {error}")
        return print_error(f"error: {error}", error.status)
    except Exception as error:  # with several ranks the watchdog reports errors; here are those before the ranks have met
        where = f"rank {env.rank} on host {os.uname().nodename}"
        message = explain_error(error, where)
        text = f"error: {message}" if message else f"error: {where}: {type(error).__name__}: {error}"
        write_error_file(text)
        return print_error(text if message else traceback.format_exc() + text, exit_status(error))


def refuse_on_all(error: ConfigError, env: LaunchEnvironment, minutes: float) -> bool:
    """End all ranks with the mistakes that this rank has found in the command. Does not return once rank 0 has them.

    Args:
        error: the mistakes.
        env: the launcher's description of this process.
        minutes: time to wait for rank 0.

    Returns:
        False when rank 0 cannot be reached.
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
        where: rank, host and phase, which go before the message of an error that other ranks may not have.
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
        message: the whole message.
        status: the exit status to return.
        is_reporter: false on a rank that leaves the message to another.
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


def print_lines(out: TextIO | None, *lines: str) -> None:
    """Print and flush lines; print nothing when `out` is None, as on all ranks but the first."""
    for line in lines:
        if out is not None:
            print(line, file=out, flush=True)
