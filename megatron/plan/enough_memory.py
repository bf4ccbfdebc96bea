"""Refuse a run whose state cannot fit into memory, before anything is allocated.

Compared is what is certain: weights, gradients and optimizer state of a rank, exact, without activations, with what the
device says it has. A run that passes may still run out of memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from megatron.config.schema import RunConfig
from megatron.launch.device import Hardware, choose_rank_device
from megatron.launch.environment import LaunchEnvironment
from megatron.launch.errors import InputError
from megatron.launch.memory import format_gib, host_memory
from megatron.mesh.grid import Grid
from megatron.plan.memory import optimizer_shards, rank_state
from megatron.plan.size import MetaModel
from megatron.plan.stages import plan_stages
from megatron.plan.state_size import StateBytes

RELEASE_SECONDS = 10.0  # that the processes of a run before this one may take to give a GPU's memory back
LOWER_MEMORY = (
    "smaller are a --micro-batch-size, --seq-length, --num-layers and --hidden-size; --recompute-activations keeps less; "
    "more ranks share it with --tensor-model-parallel-size, --pipeline-model-parallel-size or --use-distributed-optimizer"
)


@dataclass(frozen=True)
class FreeMemory:
    """Memory that a device has left.

    bytes: of it. description: the same in words, for a message. exclusive: it is this rank's alone, else all ranks of the
    host share it.
    """

    bytes: int
    description: str
    exclusive: bool


def check_memory(
    config: RunConfig, env: LaunchEnvironment, look: Callable[[RunConfig, LaunchEnvironment], FreeMemory | None] | None = None
) -> None:
    """Check that the state of this host's ranks fits. Call it before any of them allocates.

    Args:
        config: of the run, with the vocabulary's size.
        env: of this process.
        look: measures what the device has; by default `free_memory`.

    Raises:
        InputError: the state does not fit; the message says what is needed, what there is, and which flags lower it.
    """
    grid = Grid.from_layout(config.layout, env.world_size)
    look = look or free_memory
    free = look(config, env)
    if free is None or (env.local_rank and not free.exclusive):  # one rank asks for all of its host
        return
    every = rank_states(config, grid, [env.rank] if free.exclusive else range(env.world_size))
    if not free.exclusive and env.launcher == "srun":
        # srun may deal its ranks out over the hosts in any way, so that only the smallest states are certain to be here.
        every = sorted(every, key=lambda state: state.total)[: env.local_size]
    elif not free.exclusive:
        every = every[env.rank - env.local_rank :][: env.local_size]
    needed = sum(state.total for state in every)
    if free.exclusive:  # memory that another process is about to give back counts
        until = time.monotonic() + RELEASE_SECONDS
        while needed > free.bytes and time.monotonic() < until:
            time.sleep(0.5)
            free = look(config, env) or free
    if needed > free.bytes:
        fullest = max(every, key=lambda state: state.total)
        parts = [f"weights {format_gib(fullest.weights)}"]
        if not config.eval.skip_train:
            parts += [f"gradients {format_gib(fullest.gradients)}", f"optimizer {format_gib(fullest.optimizer)}"]
        who = "this rank" if free.exclusive else "one process" if len(every) == 1 else f"the {len(every)} ranks of this host"
        raise InputError(
            f"out of memory before the start: {who} would hold {format_gib(needed)} without activations "
            f"({'of each ' if len(every) > 1 else ''}{', '.join(parts)}), and {free.description}. "
            f"--dry-run says what each rank needs; lower it: {_advice(config)}"
        )


def rank_states(config: RunConfig, grid: Grid, ranks: Sequence[int]) -> list[StateBytes]:
    """Return the bytes that each rank will hold from its first step to its last: of an evaluation alone, weights only.

    Args:
        config: of the run, with the vocabulary's size.
        grid: of all its ranks.
        ranks: those to look at, global numbers.
    """
    plan, model, owners = plan_stages(config), MetaModel.from_config(config), optimizer_shards(config, grid)
    by_stage: dict[int, StateBytes] = {}  # all ranks of a pipeline rank hold the same, and a job may have thousands
    every = []
    for rank in ranks:
        pp = grid.coordinate(rank)["pp"]
        if pp not in by_stage:
            state = rank_state(config, model, plan, pp, owners)
            by_stage[pp] = StateBytes(state.weights, 0, 0) if config.eval.skip_train else state
        every.append(by_stage[pp])
    return every


def free_memory(config: RunConfig, env: LaunchEnvironment) -> FreeMemory | None:
    """Return what this rank's device has; None where nothing can be said of it."""
    found = Hardware.detect()
    device, choice = choose_rank_device(env, config.layout.distributed_backend, found)
    if choice.problem:  # which the job will say
        return None
    if device.type != "cuda":
        there = host_memory()
        return None if there is None else FreeMemory(there.free, there.description, exclusive=False)
    free, capacity = torch.cuda.mem_get_info(device)
    if found.gpus < env.local_size and choice.backend != "nccl":  # shared, and others may have allocated already
        return FreeMemory(capacity, f"the GPU has {format_gib(capacity)}", exclusive=True)
    return FreeMemory(
        free, f"GPU {device.index} has {format_gib(capacity)}, of which {format_gib(free)} are free", exclusive=True
    )


def _advice(config: RunConfig) -> str:
    """The flags that make a rank's state smaller, of those that are not used yet."""
    flags = ["a smaller model (--num-layers, --hidden-size)", "more GPUs or hosts with a larger --tensor-model-parallel-size"]
    flags += ["--pipeline-model-parallel-size"]
    if not config.layout.use_distributed_optimizer:
        flags.append("--use-distributed-optimizer")
    return f"{', '.join(flags[:-1])} or {flags[-1]}"
