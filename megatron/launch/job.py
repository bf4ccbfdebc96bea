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
from megatron.launch.errors import Early, Explain, JobError
from megatron.launch.exit_report import exit_status
from megatron.launch.heartbeat import Process, WatchdogTimeouts
from megatron.launch.malloc import keep_freed_memory
from megatron.launch.signals import StopSignals
from megatron.launch.store import connect_store, lost_store, serves_store
from megatron.launch.watchdog import JobWatchdog, Watchdog

NCCL_TIMEOUT_MARGIN = timedelta(seconds=60)  # by which NCCL's timeout exceeds the watchdog's


@dataclass(frozen=True)
class Job:
    """A process of a running job.

    Attributes:
        env: the launcher's environment of the process.
        device: the device that it computes on.
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
        talk = f"{self.backend}" if self.backend else "no communication needed"
        return f"{self.env.world_size} process(es) started by {self.env.launcher}, on {self.device.type}, {talk}"


@dataclass(frozen=True)
class Guard:
    """Watchdog and store of a process, before and during its process group; a single process has neither.

    Attributes:
        watch: the watchdog of this process.
        store: its connection to the job's key-value store; None for a single process.
        timeout: the timeout of a collective.
        world_size: number of processes of the job.
        signals: the requests to stop.
    """

    watch: Watchdog = field(default_factory=Watchdog)
    store: Any = None
    timeout: timedelta = timedelta(minutes=10)
    world_size: int = 1
    signals: StopSignals = field(default_factory=StopSignals)

    def wait_for_all(self, what: str, log: Callable[[str], object]) -> None:
        """Wait without a time limit until every rank has called this; the watchdog finds a rank that dies meanwhile.

        Args:
            what: description of what the missing ranks are still doing.
            log: called with a line every half minute of waiting.
        """
        if self.store is None:
            return
        self.watch.waiting(f"waiting for ranks that are still {what}")
        while self.signals.name is not None:  # there is nothing to save yet, so the watchdog ends the job
            time.sleep(0.05)
        # A counter instead of torch's barrier, which has a timeout and blocks the connection to the store.
        here, next_line = self.store.add("here", 1), time.monotonic() + 30.0
        while here < self.world_size:
            time.sleep(0.05)
            here = self.store.add("here", 0)
            if time.monotonic() > next_line:
                log(f"waiting for {self.world_size - here} of {self.world_size} ranks, which are still {what}")
                next_line += 30.0

    def ask_rank_0(self, rank: int, what: str, work: Callable[[], str | None]) -> str | None:
        """Return the first rank's answer on all ranks, which wait for it as long as it takes. Collective, once for each `what`.

        Args:
            rank: this rank.
            what: description of what rank 0 does.
            work: called on rank 0 only; returns the answer, an error message or None.
        """
        if self.store is None:
            answers = [work() if rank == 0 else None]
            if dist.is_initialized():
                dist.broadcast_object_list(answers, 0)
            return answers[0]
        key = f"first {what}"
        if rank == 0:
            answer = work()
            self.store.set(key, answer or "")
            return answer
        self.watch.waiting(f"waiting for rank 0, which is {what}")
        while not self.store.check([key]):
            time.sleep(0.05)
        return str(self.store.get(key).decode()) or None

    def processes(self, own: Process, rank: int) -> list[Process] | None:
        """Return the processes of all ranks on the first one, None on the others. Needs `wait_for_all` before it."""
        if self.store is None:
            return [own] if rank == 0 else None
        self.store.set(f"process {rank}", json.dumps(asdict(own)))
        if rank:
            return None
        texts = self.store.multi_get([f"process {each}" for each in range(self.world_size)])
        return [Process(**json.loads(text)) for text in texts]


@contextmanager
def guarded(
    env: LaunchEnvironment,
    timeout_minutes: float = 10.0,
    *,
    explain: Explain = lambda error, where: None,
    timeouts: WatchdogTimeouts | None = None,
    signals: StopSignals | None = None,
    early: Early | None = None,
) -> Iterator[Guard]:
    """Run the watchdogs of a job inside the block. They need no process group, so they can start before there is one.

    An error that leaves the block, and a rank that dies or hangs, ends all ranks with one message; the block then does not
    return. A single process, or one whose process group exists already, gets no watchdog, and errors pass through.

    Args:
        env: the launcher's environment of this process.
        timeout_minutes: the timeout of a collective, and of the start.
        explain: returns the message of errors that need no traceback; see `errors.Explain`.
        timeouts: the watchdog's timeouts; default `WatchdogTimeouts()`.
        signals: requests to stop that the caller answers; by default a signal ends the job.
        early: message and status of a job that is asked to stop before it can save; see `JobWatchdog`.
    """
    timeout = timedelta(minutes=timeout_minutes)
    if env.world_size == 1 or dist.is_initialized():
        yield Guard(timeout=timeout)
        return
    own = signals is None
    signals = signals or StopSignals()
    store = connect_store(env, timeout)
    watch = JobWatchdog(
        connect_store(env, timeout, again=True),
        env,
        timeout,
        keeps_store=serves_store(env.rank),
        timeouts=timeouts,
        explain=explain,
        signals=signals,
        early=early,
    )
    try:
        watch.start()
    except RuntimeError as error:
        raise lost_store(env) from error
    if own:
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
        if own:
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
    look: Callable[[], Hardware] = Hardware.detect,
) -> Iterator[Job]:
    """Start torch.distributed for several processes, and stop it at the end. An existing process group is used and kept.

    On a CPU it also sets the number of torch's threads and the behaviour of malloc, for the whole process.

    Args:
        env: the launcher's environment of this process.
        backend: `nccl` or `gloo`; None for the one that fits the hardware.
        timeout_minutes: the timeout of a collective, and of the start.
        explain: see `guarded`.
        timeouts: see `guarded`.
        guard: the watchdog and store, if the process has them already; by default `guarded` creates them.
        look: finds the GPUs of this process.

    Raises:
        JobError: the hardware is not enough, or differs between ranks.
    """
    device, choice = choose_rank_device(env, backend, look())
    with nullcontext(guard) if guard else guarded(env, timeout_minutes, explain=explain, timeouts=timeouts) as there:
        if there.store is not None:
            there.watch.waiting("comparing what the ranks compute on")
            agree_on_devices(there.store, env, choice, there.timeout)
        elif choice.problem:
            raise JobError(choice.problem, status=2)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        else:
            keep_freed_memory()
            if env.local_size > 1 and "OMP_NUM_THREADS" not in os.environ:
                torch.set_num_threads(max(1, (os.cpu_count() or 1) // env.local_size))
        if there.store is None:
            yield Job(env, device, choice.backend if env.world_size > 1 else None, there.timeout)
            return
        # NCCL's own watchdog would abort the process without naming the phase, so its timeout comes after ours.
        limit = there.timeout + NCCL_TIMEOUT_MARGIN if choice.backend == "nccl" else there.timeout
        # Without device_id, so that NCCL opens a communicator for each pair of ranks that send to each other. Bound to a device
        # it has one for the whole group, in which a receive that was posted early holds up every send behind it.
        ranks = env.world_size
        dist.init_process_group(choice.backend, store=there.store, rank=env.rank, world_size=ranks, timeout=limit)
        yield Job(env, device, choice.backend, limit, there.watch)
        there.watch.waiting("the end of the job")
        if dist.is_initialized():
            dist.destroy_process_group()
