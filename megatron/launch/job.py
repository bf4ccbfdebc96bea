"""Start and stop torch.distributed, on the device and with the backend that all ranks have."""

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
from megatron.launch.store import connect_store, serves_store
from megatron.launch.watchdog import JobWatchdog, Watchdog

NCCL_TIMEOUT_MARGIN = timedelta(seconds=60)  # of NCCL's timeout beyond the watch's


@dataclass(frozen=True)
class Job:
    """A started process of a job.

    Attributes:
        env: the launcher's environment of the process.
        device: on which it computes.
        backend: through which it communicates; None for a single process.
        timeout: of a collective; None for torch's own.
        watch: the watchdog that is told what the process does.
    """

    env: LaunchEnvironment
    device: torch.device
    backend: str | None
    timeout: timedelta | None = None
    watch: Watchdog = field(default_factory=Watchdog)

    @property
    def is_main(self) -> bool:
        """True on rank 0, which speaks for all."""
        return self.env.rank == 0

    def describe(self) -> str:
        """Return in words how many processes there are, who started them, and on what."""
        talk = f"{self.backend}" if self.backend else "no communication needed"
        return f"{self.env.world_size} process(es) started by {self.env.launcher}, on {self.device.type}, {talk}"


@dataclass(frozen=True)
class Guard:
    """The protection of a process while its job lasts; a single process has none of it.

    Attributes:
        watch: the watchdog of this process.
        store: its connection to the job's key-value store; None for a single process.
        timeout: of a collective.
        world_size: number of processes of the job.
        signals: the requests to stop.
    """

    watch: Watchdog = field(default_factory=Watchdog)
    store: Any = None
    timeout: timedelta = timedelta(minutes=10)
    world_size: int = 1
    signals: StopSignals = field(default_factory=StopSignals)

    def wait_for_all(self, what: str, tell: Callable[[str], object]) -> None:
        """Wait until every rank has come here, for as long as it takes; the watchdog finds a rank that dies meanwhile.

        Args:
            what: what the ranks that are missing are still doing, in words.
            tell: gets a line every half minute of waiting.
        """
        if self.store is None:
            return
        self.watch.waiting(f"waiting for ranks that are still {what}")
        while self.signals.name is not None:  # before all are here there is nothing to save: the watch ends the job
            time.sleep(0.05)
        # A counter and no barrier of torch: nobody knows how long a rank needs, and this rank must stay reachable.
        here, next_line = self.store.add("here", 1), time.monotonic() + 30.0
        while here < self.world_size:
            time.sleep(0.05)
            here = self.store.add("here", 0)
            if time.monotonic() > next_line:
                tell(f"waiting for {self.world_size - here} of {self.world_size} ranks, which are still {what}")
                next_line += 30.0

    def ask_rank_0(self, rank: int, what: str, work: Callable[[], str | None]) -> str | None:
        """Return the first rank's answer on all ranks, which wait for it as long as it takes. Collective, once for each `what`.

        Args:
            rank: number of this process.
            what: what the first rank does, in words.
            work: makes the answer, on the first rank alone: what is wrong in words, or None.
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
    """Have the processes of a job watch one another. No process group is needed for that, so it can begin before there is one.

    An error that leaves the block, and a rank that dies or hangs, ends all of them with one message, and this process does not
    return. One process, and a group that is there, are not watched; errors just pass through.

    Args:
        env: the launcher's environment of this process.
        timeout_minutes: of a collective, and of the start.
        explain: puts errors that need no traceback in words; see `errors.Explain`.
        timeouts: seconds that the watchdog waits; default `WatchdogTimeouts()`.
        signals: requests to stop that the caller answers; by default a signal ends the job.
        early: tells how a job ends that is asked to before it can save; see `JobWatchdog`.
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
    if own:
        signals.install()
    watch.start()
    signals.watched()
    try:
        yield Guard(watch, store, timeout, env.world_size, signals)
    except BaseException as error:
        # An exit with status 0 is no failure.
        if exit_status(error):
            watch.fail(error)  # and take nothing apart: it could block for ever
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
    """Start torch.distributed for more than one process, and stop it at the end. A group that is there stays.

    For a process that does nothing else: on a CPU it also sets the number of threads and how the allocator keeps memory.

    Args:
        env: the launcher's environment of this process.
        backend: `nccl` or `gloo`; None for the one that fits the hardware.
        timeout_minutes: of a collective, and of the start.
        explain: as of `guarded`.
        timeouts: as of `guarded`.
        guard: the watch, where the processes have one already; else `guarded` makes it.
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
        # NCCL's own watchdog aborts the process; the watch, which knows what it did, has its say before.
        limit = there.timeout + NCCL_TIMEOUT_MARGIN if choice.backend == "nccl" else there.timeout
        # Without device_id, so that NCCL opens a communicator for each pair of ranks that send to each other. Bound to a device
        # it has one for the whole group, in which a receive that was posted early holds up every send behind it.
        ranks = env.world_size
        dist.init_process_group(choice.backend, store=there.store, rank=env.rank, world_size=ranks, timeout=limit)
        yield Job(env, device, choice.backend, limit, there.watch)
        there.watch.waiting("the end of the job")
        if dist.is_initialized():
            dist.destroy_process_group()
