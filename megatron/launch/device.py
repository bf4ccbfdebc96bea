"""Choose the device and the backend of each rank; all ranks compare their choices before the process group forms.

A rank whose GPU driver has failed would choose gloo, while the others wait for it in NCCL. So every rank publishes its choice
in the job's store, and rank 0 compares them. If they do not fit together, all ranks end with the same message.
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

MAX_HOSTS = 4  # number of hosts with the same choice that a message names
AGREED = "yes"  # rank 0's result of the comparison if there is no error message


@dataclass(frozen=True)
class Hardware:
    """The GPUs that this process sees on its host.

    Attributes:
        gpus: number of GPUs.
        why: the reason why there is no GPU; empty if there are some.
        gpu_uuid: UUID of the GPU if there is exactly one and it can be read; otherwise empty.
    """

    gpus: int
    why: str = ""
    gpu_uuid: str = ""

    @classmethod
    def detect(cls) -> Hardware:
        """Return the GPUs that torch sees in this process."""
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if gpus:
            return cls(gpus, gpu_uuid=_gpu_uuid() if gpus == 1 else "")
        return cls(0, _why_no_gpu())


def _gpu_uuid() -> str:
    """Return the UUID of GPU 0; empty if torch or the driver does not report it."""
    try:
        return str(torch.cuda.get_device_properties(0).uuid)
    except (AttributeError, RuntimeError, AssertionError):
        return ""


def _why_no_gpu() -> str:
    """Return the reason why torch sees no GPU."""
    if torch.version.cuda is None and torch.version.hip is None:
        return "torch is built without CUDA"
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return "CUDA_VISIBLE_DEVICES is empty"
    try:
        # The driver reports its problem only when torch initializes it.
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except Exception as error:  # the class depends on the driver
        return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    return "torch finds none"


@dataclass(frozen=True)
class DeviceChoice:
    """The device and backend that one rank would use.

    Attributes:
        host: name of the rank's host.
        device: type of the device, `cuda` or `cpu`.
        backend: `nccl` or `gloo`.
        why: the reason for the choice.
        gpu_uuid: UUID of the rank's GPU, if it must not be shared and its number does not identify it; otherwise empty.
        problem: why the command's backend cannot be used; empty if it can.
    """

    host: str
    device: str
    backend: str
    why: str = ""
    gpu_uuid: str = ""
    problem: str = ""


def device_and_backend(env: LaunchEnvironment, backend: str | None, gpus: int) -> tuple[torch.device, str]:
    """Return device and backend; by default nccl if the host has a GPU for each of its processes, else gloo.

    Args:
        env: the launch environment of this process.
        backend: the backend that the command names; None for the default.
        gpus: number of GPUs that this process sees.

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


def choose_rank_device(env: LaunchEnvironment, backend: str | None, hardware: Hardware) -> tuple[torch.device, DeviceChoice]:
    """Return the device that this rank would use, and its choice in the form that ranks compare.

    Args:
        env: the launch environment of this process.
        backend: the backend that the command names; None for the default.
        hardware: the GPUs that this process sees.
    """
    host, gpus = os.uname().nodename, hardware.gpus
    why = f"it has {gpus} GPU(s) for {env.local_size} process(es)" if gpus else f"it has no GPU: {hardware.why}"
    # SLURM may show each task only its own GPU, as device 0; the task then chooses as if it were alone on its host.
    sees_own_gpu = env.launcher == "srun" and gpus == 1 and env.local_size > 1
    visible_env = LaunchEnvironment(env.rank, env.world_size) if sees_own_gpu else env
    try:
        device, chosen = device_and_backend(visible_env, backend, gpus)
    except ValueError as error:
        return torch.device("cpu"), DeviceChoice(host, "cpu", backend or "gloo", why, problem=str(error))
    gpu_uuid = hardware.gpu_uuid if sees_own_gpu and chosen == "nccl" else ""
    return device, DeviceChoice(host, device.type, chosen, why, gpu_uuid)


def agree_on_devices(store: Any, env: LaunchEnvironment, own: DeviceChoice, timeout: timedelta) -> None:
    """Publish this rank's choice, and wait until rank 0 has compared all choices. Collective.

    Args:
        store: the job's key-value store.
        env: the launch environment of this process.
        own: this rank's choice.
        timeout: time within which all ranks must publish their choices.

    Raises:
        JobError: the choices do not fit together (on all ranks, status 2), or ranks are missing (on rank 0, status 1).
    """
    store.set(f"device {env.rank}", json.dumps(asdict(own)))
    if env.rank == 0:
        keys = [f"device {rank}" for rank in range(env.world_size)]
        try:
            store.wait(keys, timeout)
        except RuntimeError as error:
            missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
            raise JobError(
                f"{describe_ranks(missing)} did not join the job within {timeout.total_seconds() / 60:g} minutes"
            ) from error
        choices = [DeviceChoice(**json.loads(record)) for record in store.multi_get(keys)]
        store.set("devices agreed", device_conflict(choices) or AGREED)
    store.wait(["devices agreed"], timeout)
    result = store.get("devices agreed").decode()
    if result != AGREED:
        raise JobError(result, status=2)


def device_conflict(choices: Sequence[DeviceChoice]) -> str | None:
    """Return why ranks cannot work together; None if they can. choices: the choice of each rank, by rank."""
    groups = list(_group_hosts(choices))
    if any(choice.problem for choice in choices):
        return "; ".join(f"{hosts}: {choice.problem}" for hosts, choice in groups if choice.problem)
    if len({(choice.device, choice.backend) for choice in choices}) > 1:
        listed = [f"{hosts} would use {choice.device} and {choice.backend}, since {choice.why}" for hosts, choice in groups]
        return (
            f"the hosts of this job differ: {'; '.join(listed)}. Repair or exclude the faulty hosts; or share GPUs between "
            "processes with --distributed-backend gloo, or use CPUs everywhere, with an empty CUDA_VISIBLE_DEVICES on all hosts"
        )
    # Ranks that see a single GPU all know it as device 0; only the UUID shows whether it is the same one.
    gpu_ranks: dict[tuple[str, str], list[int]] = {}
    for rank, choice in enumerate(choices):
        if choice.gpu_uuid:
            gpu_ranks.setdefault((choice.host, choice.gpu_uuid), []).append(rank)
    for (host, _), ranks in gpu_ranks.items():
        if len(ranks) > 1:
            return (
                f"{describe_ranks(ranks)} on host {host} share one GPU, which NCCL does not support. Give each its own "
                "(srun --gpus-per-task 1), or use --distributed-backend gloo"
            )
    return None


def _group_hosts(choices: Sequence[DeviceChoice]) -> Iterator[tuple[str, DeviceChoice]]:
    """Group the ranks that made the same choice, and yield the hosts of each group, as text, and the choice.

    The group with the fewest hosts comes first, since these are probably the faulty ones.
    """
    groups: dict[tuple[str, ...], dict[str, list[int]]] = {}  # choice -> host -> ranks
    for rank, choice in enumerate(choices):
        key = (choice.device, choice.backend, choice.why, choice.problem)
        groups.setdefault(key, {}).setdefault(choice.host, []).append(rank)
    for hosts in sorted(groups.values(), key=len):
        named = [f"{host} ({describe_ranks(ranks)})" for host, ranks in list(hosts.items())[:MAX_HOSTS]]
        more = len(hosts) - len(named)
        listed = ", ".join(named) + (f" and {more} more" if more else "")
        yield f"host {listed}", choices[next(iter(hosts.values()))[0]]


def describe_ranks(ranks: Sequence[int]) -> str:
    """Return ranks as text: `rank 3`, `ranks 0 to 7`, `ranks 0, 4, 8`; of many, only the first and the last."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    if len(ranks) > 2 and list(ranks) == list(range(ranks[0], ranks[0] + len(ranks))):
        return f"ranks {ranks[0]} to {ranks[-1]}"
    if len(ranks) > 2 * MAX_HOSTS:
        return f"{len(ranks)} ranks from {ranks[0]} to {ranks[-1]}"
    return "ranks " + ", ".join(map(str, ranks))
