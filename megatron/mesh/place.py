"""Who this process is, as its launcher's environment says. Imports no torch.

The same program runs under torchrun (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT), as `srun python ...`
(SLURM's own variables), and as plain `python` (one process, no process group at all).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Place:
    """This process among the processes of the job. local_size: processes on this host. source: who started it.

    job, attempt: the launcher's name for the job, and how often it has started these processes anew, where it tells.
    blocking: CUDA_LAUNCH_BLOCKING is set, so the launch of a kernel returns when the kernel ends.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_size: int = 1
    source: str = "python"
    address: str = "127.0.0.1"
    port: int = 29500
    job: str | None = None
    attempt: int = 0
    blocking: bool = False

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> Place:
        """Read the launcher's variables. ValueError naming the variable that is missing or no number."""
        blocking = environ.get("CUDA_LAUNCH_BLOCKING", "0") not in ("", "0")
        return replace(cls._started(environ), blocking=blocking)

    @classmethod
    def _started(cls, environ: Mapping[str, str]) -> Place:
        if "RANK" in environ and "WORLD_SIZE" in environ:
            world = _number(environ, "WORLD_SIZE")
            return cls(
                _number(environ, "RANK"),
                world,
                _number(environ, "LOCAL_RANK", 0),
                _number(environ, "LOCAL_WORLD_SIZE", world),
                "torchrun",
                environ.get("MASTER_ADDR", "127.0.0.1"),
                _number(environ, "MASTER_PORT", 29500),
                environ.get("TORCHELASTIC_RUN_ID"),
                _number(environ, "TORCHELASTIC_RESTART_COUNT", 0),
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
    for item in re.findall(r"[^,\[]+(?:\[[^\[\]]*\])?[^,\[]*", nodelist):
        match = re.fullmatch(r"([^\[]*)\[([^\]]*)\](.*)", item)
        if match is None:
            hosts.append(item)
            continue
        before, ranges, after = match.groups()
        for part in ranges.split(","):
            low, _, high = part.partition("-")
            hosts += [f"{before}{n:0{len(low)}d}{after}" for n in range(int(low), int(high or low) + 1)]
    return hosts
