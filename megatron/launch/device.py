"""What each rank computes and communicates with, agreed on over the job's store before any process group forms.

A host whose driver is dead would take gloo while the others wait for it in NCCL. So every rank says what it found, the first
one compares, and where they differ all end with one message.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import torch

from megatron.launch.environment import LaunchEnvironment
from megatron.launch.errors import JobError

MAX_HOSTS = 4  # that a message names of one kind


@dataclass(frozen=True)
class Hardware:
    """What this process sees of its host. why: why there is no GPU. card: which one the only GPU is, where it can be told."""

    gpus: int
    why: str = ""
    card: str = ""

    @classmethod
    def detect(cls) -> Hardware:
        """Look at the GPUs of this machine."""
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if gpus:
            return cls(gpus, card=_card() if gpus == 1 else "")
        return cls(0, _why_none())


def _card() -> str:
    try:
        return str(torch.cuda.get_device_properties(0).uuid)
    except (AttributeError, RuntimeError, AssertionError):
        return ""


def _why_none() -> str:
    if torch.version.cuda is None and torch.version.hip is None:
        return "torch is built without CUDA"
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return "CUDA_VISIBLE_DEVICES is empty"
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except Exception as error:  # whatever the driver says
        return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    return "torch sees none"


@dataclass(frozen=True)
class DeviceChoice:
    """What one rank takes. device: its type. why: what it follows from. problem: why it cannot do as it was told."""

    host: str
    device: str
    backend: str
    why: str = ""
    card: str = ""
    problem: str = ""


def device_and_backend(env: LaunchEnvironment, backend: str | None, gpus: int) -> tuple[torch.device, str]:
    """Device and backend: nccl with one GPU per process of the host, else gloo. ValueError for nccl without GPUs."""
    enough = gpus >= env.local_size
    if backend == "nccl" and not (gpus and enough):
        raise ValueError(
            f"--distributed-backend nccl needs one GPU per process; this host has {gpus} for {env.local_size}. "
            "Start fewer processes, or use --distributed-backend gloo"
        )
    device = torch.device("cuda", env.local_rank % gpus) if gpus else torch.device("cpu")
    return device, backend or ("nccl" if gpus and enough else "gloo")


def choose_device(env: LaunchEnvironment, asked: str | None, found: Hardware) -> tuple[torch.device, DeviceChoice]:
    """What this rank would take, and what it says of it. asked: the backend of the command, if it names one."""
    # SLURM may show each task only its own GPU, which is then device 0.
    alone = env.launcher == "srun" and found.gpus == 1 and env.local_size > 1
    host, gpus = os.uname().nodename, found.gpus
    why = f"it has {gpus} GPU(s) for {env.local_size} process(es)" if gpus else f"it has no GPU: {found.why}"
    try:
        device, backend = device_and_backend(LaunchEnvironment(env.rank, env.world_size) if alone else env, asked, gpus)
    except ValueError as error:
        return torch.device("cpu"), DeviceChoice(host, "cpu", asked or "gloo", why, problem=str(error))
    return device, DeviceChoice(host, device.type, backend, why, found.card if alone and backend == "nccl" else "")


def agree_on_devices(store: Any, env: LaunchEnvironment, own: DeviceChoice, timeout: timedelta) -> None:
    """Tell the others what this rank takes, and hear whether all fit together. Collective.

    store: of the job. JobError with status 2, the same on all ranks, when they do not; with status 1 when some do not come.
    """
    store.set(f"means {env.rank}", json.dumps(asdict(own)))
    if env.rank == 0:
        keys = [f"means {rank}" for rank in range(env.world_size)]
        try:
            store.wait(keys, timeout)
        except RuntimeError as error:
            missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
            raise JobError(
                f"{describe_ranks(missing)} did not join the job in {timeout.total_seconds() / 60:g} minutes"
            ) from error
        store.set(
            "means agreed", device_conflict([DeviceChoice(**json.loads(said)) for said in store.multi_get(keys)]) or "yes"
        )
    store.wait(["means agreed"], timeout)
    verdict = store.get("means agreed").decode()
    if verdict != "yes":
        raise JobError(verdict, status=2)


def device_conflict(choice: Sequence[DeviceChoice]) -> str | None:
    """Why ranks with these means, by rank, cannot work together; None where they can."""
    if any(one.problem for one in choice):
        return "; ".join(f"{who}: {one.problem}" for who, one in _alike(choice) if one.problem)
    if len({(one.device, one.backend) for one in choice}) > 1:
        kinds = "; ".join(f"{who} would take {one.device} and {one.backend}, since {one.why}" for who, one in _alike(choice))
        return (
            f"the hosts of this job differ: {kinds}. Mend what is wrong or leave those hosts out; --distributed-backend gloo "
            "lets processes share a GPU, and an empty CUDA_VISIBLE_DEVICES for all processes makes all compute on CPUs"
        )
    cards: dict[tuple[str, str], list[int]] = {}
    for rank, one in enumerate(choice):
        if one.card:
            cards.setdefault((one.host, one.card), []).append(rank)
    for (host, _), ranks in cards.items():
        if len(ranks) > 1:
            return (
                f"{describe_ranks(ranks)} on host {host} have one GPU together, which NCCL refuses. Give each its own "
                "(srun --gpus-per-task 1), or share it with --distributed-backend gloo"
            )
    return None


def _alike(choice: Sequence[DeviceChoice]) -> Iterator[tuple[str, DeviceChoice]]:
    """The hosts that say the same, in words, and one rank of them; the fewest first, since they are the ones to look at."""
    kinds: dict[tuple[str, ...], dict[str, list[int]]] = {}
    for rank, one in enumerate(choice):
        kinds.setdefault((one.device, one.backend, one.why, one.problem), {}).setdefault(one.host, []).append(rank)
    for hosts in sorted(kinds.values(), key=len):
        named = [f"{host} ({describe_ranks(ranks)})" for host, ranks in list(hosts.items())[:MAX_HOSTS]]
        more = len(hosts) - len(named)
        words = ", ".join(named) + (f" and {more} more" if more else "")
        yield f"host {words}", choice[next(iter(hosts.values()))[0]]


def describe_ranks(ranks: Sequence[int]) -> str:
    """`rank 3`, `ranks 0 to 7`, `ranks 0, 4, 8`, of many the first and the last."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    if len(ranks) > 2 and list(ranks) == list(range(ranks[0], ranks[0] + len(ranks))):
        return f"ranks {ranks[0]} to {ranks[-1]}"
    if len(ranks) > 2 * MAX_HOSTS:
        return f"{len(ranks)} ranks from {ranks[0]} to {ranks[-1]}"
    return "ranks " + ", ".join(map(str, ranks))
