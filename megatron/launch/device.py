"""Choose the device and the backend of each rank; all ranks compare their choices before the process group forms.

A host whose driver has failed would choose gloo, while the others wait for it in NCCL. So every rank publishes its choice in
the job's store, and rank 0 compares them. If they differ, all ranks end with one message.
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

MAX_HOSTS = 4  # hosts of one kind that a message names


@dataclass(frozen=True)
class Hardware:
    """The GPUs that this process sees on its host.

    Attributes:
        gpus: number of GPUs.
        why: the reason why there is none; empty if there are some.
        gpu_uuid: UUID of the only GPU, if it can be read; otherwise empty.
    """

    gpus: int
    why: str = ""
    gpu_uuid: str = ""

    @classmethod
    def detect(cls) -> Hardware:
        """Return the GPUs of this machine."""
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if gpus:
            return cls(gpus, gpu_uuid=_gpu_uuid() if gpus == 1 else "")
        return cls(0, _why_none())


def _gpu_uuid() -> str:
    """Return the UUID of GPU 0; empty if torch or the driver does not report it."""
    try:
        return str(torch.cuda.get_device_properties(0).uuid)
    except (AttributeError, RuntimeError, AssertionError):
        return ""


def _why_none() -> str:
    """Return the reason why torch sees no GPU."""
    if torch.version.cuda is None and torch.version.hip is None:
        return "torch is built without CUDA"
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return "CUDA_VISIBLE_DEVICES is empty"
    try:
        # The driver reports the reason only when it is initialised.
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except Exception as error:  # of any class, depending on the driver
        return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    return "torch sees none"


@dataclass(frozen=True)
class DeviceChoice:
    """The device and backend that one rank would take.

    Attributes:
        host: name of its host.
        device: type of the device, `cuda` or `cpu`.
        backend: `nccl` or `gloo`.
        why: the reason for the choice.
        gpu_uuid: UUID of its GPU, if NCCL needs it for this rank alone; otherwise empty.
        problem: why the backend of the command is impossible; empty if it is possible.
    """

    host: str
    device: str
    backend: str
    why: str = ""
    gpu_uuid: str = ""
    problem: str = ""


def device_and_backend(env: LaunchEnvironment, backend: str | None, gpus: int) -> tuple[torch.device, str]:
    """Return device and backend: nccl with one GPU per process of the host, else gloo.

    Args:
        env: the launcher's environment of this process.
        backend: the backend that the command names; None for none.
        gpus: number of GPUs that the process sees.

    Raises:
        ValueError: the command names nccl, and there are fewer GPUs than processes.
    """
    enough = gpus >= env.local_size
    if backend == "nccl" and not (gpus and enough):
        raise ValueError(
            f"--distributed-backend nccl needs one GPU per process; this host has {gpus} for {env.local_size}. "
            "Start fewer processes, or use --distributed-backend gloo"
        )
    device = torch.device("cuda", env.local_rank % gpus) if gpus else torch.device("cpu")
    return device, backend or ("nccl" if gpus and enough else "gloo")


def choose_rank_device(env: LaunchEnvironment, asked: str | None, found: Hardware) -> tuple[torch.device, DeviceChoice]:
    """Return the device that this rank would take, and its choice for the comparison with the other ranks.

    Args:
        env: the launcher's environment of this process.
        asked: the backend that the command names; None for none.
        found: the GPUs that this process sees.
    """
    # SLURM may show each task only its own GPU, which is then device 0.
    alone = env.launcher == "srun" and found.gpus == 1 and env.local_size > 1
    host, gpus = os.uname().nodename, found.gpus
    why = f"it has {gpus} GPU(s) for {env.local_size} process(es)" if gpus else f"it has no GPU: {found.why}"
    try:
        device, backend = device_and_backend(LaunchEnvironment(env.rank, env.world_size) if alone else env, asked, gpus)
    except ValueError as error:
        return torch.device("cpu"), DeviceChoice(host, "cpu", asked or "gloo", why, problem=str(error))
    return device, DeviceChoice(host, device.type, backend, why, found.gpu_uuid if alone and backend == "nccl" else "")


def agree_on_devices(store: Any, env: LaunchEnvironment, own: DeviceChoice, timeout: timedelta) -> None:
    """Publish this rank's choice, and wait for rank 0's comparison of all choices. Collective.

    Args:
        store: the job's key-value store.
        env: the launcher's environment of this process.
        own: this rank's choice.
        timeout: time that all ranks together have to publish theirs.

    Raises:
        JobError: with status 2, the same on all ranks, if the choices do not fit together; with status 1 if ranks are missing.
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


def device_conflict(choices: Sequence[DeviceChoice]) -> str | None:
    """Return why ranks with these choices, by rank, cannot work together; None if they can."""
    if any(one.problem for one in choices):
        return "; ".join(f"{who}: {one.problem}" for who, one in _alike(choices) if one.problem)
    if len({(one.device, one.backend) for one in choices}) > 1:
        kinds = "; ".join(f"{who} would take {one.device} and {one.backend}, since {one.why}" for who, one in _alike(choices))
        return (
            f"the hosts of this job differ: {kinds}. Mend what is wrong or leave those hosts out; --distributed-backend gloo "
            "lets processes share a GPU, and an empty CUDA_VISIBLE_DEVICES for all processes makes all compute on CPUs"
        )
    # Each rank sees one GPU, as its device 0; only the UUID shows whether two ranks have the same one.
    gpu_ranks: dict[tuple[str, str], list[int]] = {}
    for rank, one in enumerate(choices):
        if one.gpu_uuid:
            gpu_ranks.setdefault((one.host, one.gpu_uuid), []).append(rank)
    for (host, _), ranks in gpu_ranks.items():
        if len(ranks) > 1:
            return (
                f"{describe_ranks(ranks)} on host {host} have one GPU together, which NCCL refuses. Give each its own "
                "(srun --gpus-per-task 1), or share it with --distributed-backend gloo"
            )
    return None


def _alike(choices: Sequence[DeviceChoice]) -> Iterator[tuple[str, DeviceChoice]]:
    """Group the hosts whose ranks chose alike; yield the description and one choice of each group.

    The smallest group comes first, since its hosts are probably the faulty ones.
    """
    kinds: dict[tuple[str, ...], dict[str, list[int]]] = {}
    for rank, one in enumerate(choices):
        kinds.setdefault((one.device, one.backend, one.why, one.problem), {}).setdefault(one.host, []).append(rank)
    for hosts in sorted(kinds.values(), key=len):
        named = [f"{host} ({describe_ranks(ranks)})" for host, ranks in list(hosts.items())[:MAX_HOSTS]]
        more = len(hosts) - len(named)
        listed = ", ".join(named) + (f" and {more} more" if more else "")
        yield f"host {listed}", choices[next(iter(hosts.values()))[0]]


def describe_ranks(ranks: Sequence[int]) -> str:
    """Return text for ranks: `rank 3`, `ranks 0 to 7`, `ranks 0, 4, 8`; for many, only the first and the last."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    if len(ranks) > 2 and list(ranks) == list(range(ranks[0], ranks[0] + len(ranks))):
        return f"ranks {ranks[0]} to {ranks[-1]}"
    if len(ranks) > 2 * MAX_HOSTS:
        return f"{len(ranks)} ranks from {ranks[0]} to {ranks[-1]}"
    return "ranks " + ", ".join(map(str, ranks))
