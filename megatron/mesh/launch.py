"""Starting and stopping torch.distributed, on the device and with the backend that the machine has."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron.mesh.beats import Patience
from megatron.mesh.host_memory import keep_freed_memory
from megatron.mesh.last_words import status_of
from megatron.mesh.place import Place
from megatron.mesh.store import connect, serves_store
from megatron.mesh.watch import Explain, LiveWatch, Watch


@dataclass(frozen=True)
class Job:
    """A started process: where it stands, what it computes on, how it communicates, and whom it tells what it does."""

    place: Place
    device: torch.device
    backend: str | None
    timeout: timedelta | None = None
    watch: Watch = field(default_factory=Watch)

    @property
    def is_main(self) -> bool:
        return self.place.rank == 0

    def describe(self) -> str:
        talk = f"{self.backend}" if self.backend else "no communication needed"
        return f"{self.place.world_size} process(es) started by {self.place.source}, on {self.device.type}, {talk}"


def choose(place: Place, backend: str | None, gpus: int) -> tuple[torch.device, str]:
    """Device and backend: nccl with one GPU per process of the host, else gloo. ValueError for nccl without GPUs."""
    enough = gpus >= place.local_size
    if backend == "nccl" and not (gpus and enough):
        raise ValueError(
            f"--distributed-backend nccl needs one GPU per process; this host has {gpus} for {place.local_size}. "
            "Start fewer processes, or use --distributed-backend gloo"
        )
    device = torch.device("cuda", place.local_rank % gpus) if gpus else torch.device("cpu")
    return device, backend or ("nccl" if gpus and enough else "gloo")


@contextmanager
def job(
    place: Place,
    backend: str | None = None,
    timeout_minutes: float = 10.0,
    *,
    explain: Explain = lambda error, where: None,
    patience: Patience | None = None,
) -> Iterator[Job]:
    """Start torch.distributed for more than one process, and stop it at the end. A group that is there stays.

    The processes watch one another while the job lasts. An error that leaves the block, and a rank that dies or hangs, ends
    all of them with one message, and this process does not return. explain: errors that need no traceback, in words; see
    `watch.Explain`. One process, and a group that is there, are not watched; errors just pass through.

    For a process that does nothing else: on a CPU it also sets the number of threads and how the allocator keeps memory.
    """
    timeout = timedelta(minutes=timeout_minutes)
    # SLURM may show each task only its own GPU, which is then device 0.
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    shown_alone = place.source == "srun" and gpus == 1 and place.local_size > 1
    device, backend = choose(Place(place.rank, place.world_size) if shown_alone else place, backend, gpus)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
        if place.local_size > 1 and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // place.local_size))
    if place.world_size == 1 or dist.is_initialized():
        yield Job(place, device, backend if place.world_size > 1 else None, timeout)
        return
    store = connect(place, timeout)
    watch = LiveWatch(
        connect(place, timeout, again=True),
        place,
        timeout,
        keeps_store=serves_store(place.rank),
        patience=patience,
        explain=explain,
    )
    watch.start()
    try:
        # Without device_id, so that NCCL opens a communicator for each pair of ranks that send to each other. Bound to a device
        # it has one for the whole group, in which a receive that was posted early holds up every send behind it.
        dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.world_size, timeout=timeout)
        yield Job(place, device, backend, timeout, watch)
        watch.waiting("the end of the job")
        if dist.is_initialized():
            dist.destroy_process_group()
    except BaseException as error:
        if status_of(error):
            watch.fail(error)  # and take nothing apart: it could block for ever
        watch.stop()
        raise
    watch.stop()
