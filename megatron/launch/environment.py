"""Read rank, world size and address of this process from its launcher's environment. Imports no torch.

The same program runs under torchrun (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT), as `srun python ...`
(SLURM's variables), and as plain `python` (one process, without a process group).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

# Variables that differ between the processes of a job. A mistake in any other variable is found by all processes.
PER_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "SLURM_LOCALID")
ADVICE = "leave these variables to torchrun or srun, or unset them for a single process"


class LaunchEnvironmentError(ValueError):
    """The launcher's variables contradict each other, or are not numbers.

    Attributes:
        own: this process alone may have found the mistake, so it must report it, whatever its rank.
    """

    def __init__(self, text: str, *, own: bool = False) -> None:
        super().__init__(f"the environment variable {text}")
        self.own = own


@dataclass(frozen=True)
class LaunchEnvironment:
    """The launcher's description of this process and its job.

    Attributes:
        rank: number of this process among all processes of the job.
        world_size: number of processes of the job.
        local_rank: number of this process among those on its host.
        local_size: number of processes on this host.
        launcher: `torchrun`, `srun` or `python`.
        address: name or address of rank 0's host, which serves the job's store.
        port: port of the store.
        job: torchrun's id of the job; None under other launchers.
        attempt: number of restarts by torchrun so far.
        blocking: CUDA_LAUNCH_BLOCKING is set, so every CUDA kernel runs synchronously.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_size: int = 1
    launcher: str = "python"
    address: str = "127.0.0.1"
    port: int = 29500
    job: str | None = None
    attempt: int = 0
    blocking: bool = False

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> LaunchEnvironment:
        """Read the launcher's variables; LaunchEnvironmentError if they are wrong or contradict each other."""
        blocking = environ.get("CUDA_LAUNCH_BLOCKING", "0") not in ("", "0")
        return replace(cls._from_launcher(environ), blocking=blocking)

    @classmethod
    def _from_launcher(cls, environ: Mapping[str, str]) -> LaunchEnvironment:
        """Read the variables of torchrun or srun, without `blocking`; without either, return that of a single process."""
        if "RANK" in environ or "WORLD_SIZE" in environ:
            world = _number(environ, "WORLD_SIZE", 1)
            rank = _position(environ, "RANK", world, "WORLD_SIZE", default=0 if world == 1 else None)
            local_world = _number(environ, "LOCAL_WORLD_SIZE", world)
            if not 0 < local_world <= world:
                raise LaunchEnvironmentError(f"LOCAL_WORLD_SIZE is {local_world}, and WORLD_SIZE {world}: {ADVICE}")
            return cls(
                rank=rank,
                world_size=world,
                # Without the variable all processes are assumed to be on one host, as without LOCAL_WORLD_SIZE.
                local_rank=_position(environ, "LOCAL_RANK", local_world, "LOCAL_WORLD_SIZE", default=rank % local_world),
                local_size=local_world,
                launcher="torchrun",
                address=environ.get("MASTER_ADDR") or "127.0.0.1",
                port=_port(environ, 29500),
                job=environ.get("TORCHELASTIC_RUN_ID"),
                attempt=_number(environ, "TORCHELASTIC_RESTART_COUNT", 0),
            )
        # A batch script has SLURM_PROCID as well, but only a step that srun started can have more than one task.
        if "SLURM_STEP_ID" in environ and _number(environ, "SLURM_STEP_NUM_TASKS", 1) > 1:
            tasks_per_node = re.match(r"\d+", environ.get("SLURM_STEP_TASKS_PER_NODE", "1"))
            hosts = expand_hosts(environ.get("SLURM_STEP_NODELIST", environ.get("SLURM_NODELIST", "127.0.0.1")))
            # Steps of several jobs may share a host, so each gets a port that is derived from its ids.
            step_port = 20000 + (_number(environ, "SLURM_JOB_ID", 0) * 7 + _number(environ, "SLURM_STEP_ID")) % 12000
            world = _number(environ, "SLURM_STEP_NUM_TASKS")
            local_rank = _number(environ, "SLURM_LOCALID", 0)
            return cls(
                rank=_position(environ, "SLURM_PROCID", world, "SLURM_STEP_NUM_TASKS"),
                world_size=world,
                local_rank=local_rank,
                # The number of tasks on the first host; on a host with more, at least local_rank + 1.
                local_size=min(world, max(int(tasks_per_node.group()) if tasks_per_node else 1, local_rank + 1)),
                launcher="srun",
                address=environ.get("MASTER_ADDR") or hosts[0],
                port=_port(environ, step_port),
            )
        return cls()


def _number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    """Read a variable as an integer; LaunchEnvironmentError if it is not one, or is missing without a default."""
    text = environ.get(name)
    if text is None and default is not None:
        return default
    if text is None:
        raise LaunchEnvironmentError(
            f"{name} is not set, though other variables of its launcher are: {ADVICE}", own=name in PER_RANK_VARIABLES
        )
    if not re.fullmatch(r"[0-9]{1,9}", text.strip()):
        raise LaunchEnvironmentError(f"{name} is {text!r}, not a number: {ADVICE}", own=name in PER_RANK_VARIABLES)
    return int(text)


def _position(environ: Mapping[str, str], name: str, size: int, size_name: str, default: int | None = None) -> int:
    """Read a number from 0 to `size` - 1, where `size` is the value of the variable `size_name`."""
    if size < 1:
        raise LaunchEnvironmentError(f"{size_name} is {size}; legal: 1 and above; {ADVICE}")
    number = _number(environ, name, default)
    if number >= size:
        raise LaunchEnvironmentError(f"{name} is {number}, and {size_name} {size}; legal: 0 to {size - 1}; {ADVICE}", own=True)
    return number


def _port(environ: Mapping[str, str], default: int) -> int:
    """Read the port of the job's store."""
    port = _number(environ, "MASTER_PORT", default)
    if not 0 < port < 65536:
        raise LaunchEnvironmentError(f"MASTER_PORT is {port}; legal: 1 to 65535, one that is free on the host of rank 0")
    return port


def expand_hosts(nodelist: str) -> list[str]:
    """Expand SLURM's compressed host list: `n[1-3,07],head` -> n1 n2 n3 n07 head."""
    hosts: list[str] = []
    for item in re.findall(r"[^,\[]+(?:\[[^\[\]]*\])?[^,\[]*", nodelist):
        match = re.fullmatch(r"([^\[]*)\[([^\]]*)\](.*)", item)
        if match is None:
            hosts.append(item)
            continue
        before, ranges, after = match.groups()
        for part in ranges.split(","):
            low, _, high = part.partition("-")
            if not (low.isdecimal() and (high or low).isdecimal()):
                raise LaunchEnvironmentError(f"SLURM_STEP_NODELIST is {nodelist!r}, which is not a list of hosts: {ADVICE}")
            hosts += [f"{before}{n:0{len(low)}d}{after}" for n in range(int(low), int(high or low) + 1)]
    return hosts
