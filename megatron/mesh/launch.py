"""Who this process is, and starting torch.distributed for it.

The same program runs under torchrun (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT), as `srun python ...`
(SLURM's own variables), and as plain `python` (one process, no process group at all).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Place:
    """This process among the processes of the job. local_size: processes on this host. source: who started it."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_size: int = 1
    source: str = "python"
    address: str = "127.0.0.1"
    port: int = 29500

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> Place:
        """Read the launcher's variables. ValueError naming the variable that is missing or no number."""
        if "RANK" in environ and "WORLD_SIZE" in environ:
            world = _number(environ, "WORLD_SIZE")
            return cls(
                _number(environ, "RANK"),
                world,
                _number(environ, "LOCAL_RANK", 0),
                _number(environ, "LOCAL_WORLD_SIZE", 1 if world == 1 else min(world, max(1, torch.cuda.device_count()))),
                "torchrun",
                environ.get("MASTER_ADDR", "127.0.0.1"),
                _number(environ, "MASTER_PORT", 29500),
            )
        # A batch script has SLURM_PROCID as well; only a step that srun started has a step with tasks.
        if "SLURM_STEP_ID" in environ and _number(environ, "SLURM_STEP_NUM_TASKS", 1) > 1:
            per_node = re.match(r"\d+", environ.get("SLURM_STEP_TASKS_PER_NODE", "1"))
            hosts = expand_hosts(environ.get("SLURM_STEP_NODELIST", environ.get("SLURM_NODELIST", "127.0.0.1")))
            # Steps of several jobs may share a host: a port of their own for each.
            own_port = 20000 + (_number(environ, "SLURM_JOB_ID", 0) * 7 + _number(environ, "SLURM_STEP_ID")) % 12000
            return cls(
                _number(environ, "SLURM_PROCID"),
                _number(environ, "SLURM_STEP_NUM_TASKS"),
                _number(environ, "SLURM_LOCALID", 0),
                int(per_node.group()) if per_node else 1,
                "srun",
                environ.get("MASTER_ADDR", hosts[0]),
                _number(environ, "MASTER_PORT", own_port),
            )
        return cls()


def _number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environ.get(name)
    if text is None and default is not None:
        return default
    if text is None or not text.isdigit():
        raise ValueError(f"the environment variable {name} is {text!r}, not a number; start with torchrun, srun or python")
    return int(text)


def expand_hosts(nodelist: str) -> list[str]:
    """SLURM's compressed host list: `n[1-3,07],head` -> n1 n2 n3 n07 head."""
    hosts: list[str] = []
    for item in re.findall(r"[^,\[]+(?:\[[^\]]*\])?[^,\[]*", nodelist):
        match = re.fullmatch(r"([^\[]*)\[([^\]]*)\](.*)", item)
        if match is None:
            hosts.append(item)
            continue
        before, ranges, after = match.groups()
        for part in ranges.split(","):
            low, _, high = part.partition("-")
            hosts += [f"{before}{n:0{len(low)}d}{after}" for n in range(int(low), int(high or low) + 1)]
    return hosts


@dataclass(frozen=True)
class Job:
    """A started process: where it stands, what it computes on, how it communicates."""

    place: Place
    device: torch.device
    backend: str | None

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
def job(place: Place, backend: str | None = None, timeout_minutes: float = 10.0) -> Iterator[Job]:
    """Start torch.distributed for more than one process, and stop it at the end. A group that is there stays."""
    # SLURM may show each task only its own GPU, which is then device 0.
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    shown_alone = place.source == "srun" and gpus == 1 and place.local_size > 1
    device, backend = choose(Place(place.rank, place.world_size) if shown_alone else place, backend, gpus)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif place.local_size > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // place.local_size))
    ours = place.world_size > 1 and not dist.is_initialized()
    if ours:
        dist.init_process_group(
            backend,
            init_method=f"tcp://{place.address}:{place.port}" if place.source == "srun" else "env://",
            rank=place.rank,
            world_size=place.world_size,
            timeout=timedelta(minutes=timeout_minutes),
            device_id=device if backend == "nccl" else None,
        )
    try:
        yield Job(place, device, backend if place.world_size > 1 else None)
    finally:
        if ours and dist.is_initialized():
            dist.destroy_process_group()
