"""Start and stop torch.distributed, on the device and with the backend that all ranks agree on; attach the watchdog."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megatron.launch.device import Hardware, agree_on_devices, choose_rank_device
from megatron.launch.environment import LaunchEnvironment
from megatron.launch.errors import DescribeEarlyStop, Explain, JobError
from megatron.launch.exit_report import exit_status
from megatron.launch.heartbeat import Process, WatchdogTimeouts
from megatron.launch.malloc import keep_freed_memory
from megatron.launch.signals import StopSignals
from megatron.launch.store import connect_store, lost_store, serves_store
from megatron.launch.watchdog import JobWatchdog, Watchdog

NCCL_TIMEOUT_MARGIN = timedelta(seconds=60)  # NCCL's timeout minus the watchdog's


@dataclass(frozen=True)
class Job:
    """This process in a running job.

    Attributes:
        env: the launch environment of this process.
        device: the device on which it computes.
        backend: the backend of its collectives; None for a single process.
        timeout: the timeout of a collective; None for torch's own.
        watch: the watchdog, to which the process reports its phases.
    """

    env: LaunchEnvironment
    device: torch.device
    backend: str | None
    timeout: timedelta | None = None
    watch: Watchdog = field(default_factory=Watchdog)

    @property
    def is_main(self) -> bool:
        """True on rank 0, which prints for all ranks."""
        return self.env.rank == 0

    def describe(self) -> str:
        """Return a line with the number of processes, the launcher, the device and the backend."""
        communication = self.backend or "no communication needed"
        return f"{self.env.world_size} process(es) started by {self.env.launcher}, on {self.device.type}, {communication}"


@dataclass(frozen=True)
class Guard:
    """Watchdog and store of a process, usable even before its process group exists; a single process has neither.

    Attributes:
        watch: the watchdog of this process.
        store: its connection to the job's key-value store; None for a single process.
        timeout: the timeout of a collective.
        world_size: number of processes of the job.
        signals: the requests to stop that this process received.
    """

    watch: Watchdog = field(default_factory=Watchdog)
    store: Any = None
    timeout: timedelta = timedelta(minutes=10)
    world_size: int = 1
    signals: StopSignals = field(default_factory=StopSignals)

    def wait_for_all(self, what: str, log: Callable[[str], object]) -> None:
        """Wait without a time limit until every rank has called this; the watchdog finds a rank that dies meanwhile.

        Args:
            what: work that the missing ranks have not finished, as in "preparing their data".
            log: called every half minute with a line about the missing ranks.
        """
        if self.store is None:
            return
        self.watch.waiting(f"waiting for ranks that are still {what}")
        while self.signals.name is not None:  # the watchdog ends the job, since there is nothing to save yet
            time.sleep(0.05)
        # A counter instead of torch's barrier, which has a timeout and blocks the connection to the store.
        arrived, next_log = self.store.add("arrived", 1), time.monotonic() + 30.0
        while arrived < self.world_size:
            time.sleep(0.05)
            arrived = self.store.add("arrived", 0)
            if time.monotonic() > next_log:
                log(f"waiting for {self.world_size - arrived} of {self.world_size} ranks, which are still {what}")
                next_log += 30.0

    def ask_rank_0(self, rank: int, what: str, work: Callable[[], str | None]) -> str | None:
        """Run `work` on rank 0, and return its result on all ranks, without a time limit. Collective, once for each `what`.

        Args:
            rank: this rank.
            what: description of the work, as in "taking the lock".
            work: returns an error message or None.
        """
        if self.store is None:
            answers = [work() if rank == 0 else None]
            if dist.is_initialized():
                dist.broadcast_object_list(answers, 0)
            return answers[0]
        key = f"rank 0 {what}"
        if rank == 0:
            answer = work()
            self.store.set(key, answer or "")
            return answer
        self.watch.waiting(f"waiting for rank 0, which is {what}")
        while not self.store.check([key]):
            time.sleep(0.05)
        return str(self.store.get(key).decode()) or None

    def processes(self, own: Process, rank: int) -> list[Process] | None:
        """Return the processes of all ranks on rank 0, None on the others. Needs `wait_for_all` before it."""
        if self.store is None:
            return [own] if rank == 0 else None
        self.store.set(f"process {rank}", json.dumps(asdict(own)))
        if rank:
            return None
        records = self.store.multi_get([f"process {number}" for number in range(self.world_size)])
        return [Process(**json.loads(record)) for record in records]


@contextmanager
def guarded(
    env: LaunchEnvironment,
    timeout_minutes: float = 10.0,
    *,
    explain: Explain = lambda error, where: None,
    timeouts: WatchdogTimeouts | None = None,
    signals: StopSignals | None = None,
    describe_early_stop: DescribeEarlyStop | None = None,
) -> Iterator[Guard]:
    """Run this rank's watchdog during the block. It needs no process group, so it can start before there is one.

    If an error leaves the block, or a rank dies or hangs, all ranks end with one message, and the block does not
    return. A single process, or one whose process group exists already, gets no watchdog, and errors pass through.

    Args:
        env: the launch environment of this process.
        timeout_minutes: limit of a collective, and of connecting to the other ranks.
        explain: returns the message of an error that needs no traceback; see `errors.Explain`.
        timeouts: the watchdog's timeouts; default `WatchdogTimeouts()`.
        signals: requests to stop that the caller answers; by default a signal ends the job.
        describe_early_stop: returns message and status of a job that a signal ends before it can save.
    """
    timeout = timedelta(minutes=timeout_minutes)
    if env.world_size == 1 or dist.is_initialized():
        yield Guard(timeout=timeout)
        return
    owns_signals = signals is None
    signals = signals or StopSignals()
    store = connect_store(env, timeout)
    watch = JobWatchdog(
        connect_store(env, timeout, again=True),
        env,
        timeout,
        owns_store=serves_store(env.rank),
        timeouts=timeouts,
        explain=explain,
        signals=signals,
        describe_early_stop=describe_early_stop,
    )
    try:
        watch.start()
    except RuntimeError as error:
        raise lost_store(env) from error
    if owns_signals:
        signals.install()
    signals.hand_to_watchdog()
    try:
        yield Guard(watch, store, timeout, env.world_size, signals)
    except BaseException as error:
        if exit_status(error):  # an exit with status 0 is no failure
            watch.fail(error)  # does not return: destroying the process group could block for ever
        raise
    finally:
        watch.stop()
        if owns_signals:
            signals.close()


@contextmanager
def job(
    env: LaunchEnvironment,
    backend: str | None = None,
    timeout_minutes: float = 10.0,
    *,
    explain: Explain = lambda error, where: None,
    timeouts: WatchdogTimeouts | None = None,
    guard: Guard | None = None,
    detect: Callable[[], Hardware] = Hardware.detect,
) -> Iterator[Job]:
    """Start torch.distributed for several processes, and stop it at the end of the block; keep a process group that exists.

    On a CPU, this also sets the number of torch's threads and the behaviour of malloc, for the whole process.

    Args:
        env: the launch environment of this process.
        backend: `nccl` or `gloo`; None for the one that fits the hardware.
        timeout_minutes: limit of a collective, and of connecting to the other ranks.
        explain: see `guarded`.
        timeouts: see `guarded`.
        guard: the watchdog and store, if the process has them already; by default `guarded` creates them.
        detect: finds the GPUs of this process.

    Raises:
        JobError: the hardware does not suffice for the backend, or differs between ranks.
    """
    device, choice = choose_rank_device(env, backend, detect())
    with nullcontext(guard) if guard else guarded(env, timeout_minutes, explain=explain, timeouts=timeouts) as active:
        if active.store is not None:
            active.watch.waiting("comparing the devices of the ranks")
            agree_on_devices(active.store, env, choice, active.timeout)
        elif choice.problem:
            raise JobError(choice.problem, status=2)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        else:
            keep_freed_memory()
            if env.local_size > 1 and "OMP_NUM_THREADS" not in os.environ:
                torch.set_num_threads(max(1, (os.cpu_count() or 1) // env.local_size))
        if active.store is None:
            yield Job(env, device, choice.backend if env.world_size > 1 else None, active.timeout)
            return
        # NCCL's own watchdog would abort the process without naming the phase, so its timeout comes after ours.
        limit = active.timeout + NCCL_TIMEOUT_MARGIN if choice.backend == "nccl" else active.timeout
        # No device_id, so that NCCL opens one communicator per pair of ranks that send to each other. With device_id it has one
        # for the whole group, in which a receive that was posted early blocks every send behind it.
        ranks = env.world_size
        dist.init_process_group(choice.backend, store=active.store, rank=env.rank, world_size=ranks, timeout=limit)
        yield Job(env, device, choice.backend, limit, active.watch)
        active.watch.waiting("ending the job")
        if dist.is_initialized():
            dist.destroy_process_group()
