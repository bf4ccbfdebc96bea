"""Whether a run can fit into memory at all, found out before anything is allocated.

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
from megatron.plan.memory import shards, state_of_rank
from megatron.plan.size import MetaModel
from megatron.plan.stages import stages_of
from megatron.plan.state_size import StateBytes

RELEASE_SECONDS = 10.0  # that the processes of a run before this one may take to give a GPU's memory back
LOWER_MEMORY = (
    "smaller are a --micro-batch-size, --seq-length, --num-layers and --hidden-size; --recompute-activations keeps less; "
    "more ranks share it with --tensor-model-parallel-size, --pipeline-model-parallel-size or --use-distributed-optimizer"
)


@dataclass(frozen=True)
class Room:
    """What a device has left, in bytes and in words. own: this rank's alone, else all ranks of the host share it."""

    free: int
    words: str
    own: bool


def check_memory(
    config: RunConfig, env: LaunchEnvironment, look: Callable[[RunConfig, LaunchEnvironment], Room | None] | None = None
) -> None:
    """InputError where the state of this host's ranks cannot fit. To be called before any of them allocates it.

    Args:
        config: of the run, with the vocabulary's size.
        env: of this process.
        look: what the device has; by default `room_of`.
    """
    grid = Grid.from_layout(config.layout, env.world_size)
    look = look or room_of
    room = look(config, env)
    if room is None or (env.local_rank and not room.own):  # one rank asks for all of its host
        return
    every = states(config, grid, [env.rank] if room.own else range(env.world_size))
    if not room.own and env.launcher == "srun":  # which may deal its ranks out over the hosts, so the smallest of all
        every = sorted(every, key=total)[: env.local_size]
    elif not room.own:
        every = every[env.rank - env.local_rank :][: env.local_size]
    needed = sum(map(total, every))
    if room.own:  # memory that another process is about to give back counts
        until = time.monotonic() + RELEASE_SECONDS
        while needed > room.free and time.monotonic() < until:
            time.sleep(0.5)
            room = look(config, env) or room
    if needed > room.free:
        fullest = max(every, key=total)
        parts = [f"weights {format_gib(fullest.weights)}"]
        if not config.eval.skip_train:
            parts += [f"gradients {format_gib(fullest.gradients)}", f"optimizer {format_gib(fullest.optimizer)}"]
        who = "this rank" if room.own else "one process" if len(every) == 1 else f"the {len(every)} ranks of this host"
        raise InputError(
            f"out of memory before the start: {who} would hold {format_gib(needed)} without activations "
            f"({'of each ' if len(every) > 1 else ''}{', '.join(parts)}), and {room.words}. "
            f"--dry-run says what each rank needs; lower it: {_advice(config)}"
        )


def total(state: StateBytes) -> int:
    """Return all bytes of a rank's state."""
    return state.weights + state.gradients + state.optimizer


def states(config: RunConfig, grid: Grid, ranks: Sequence[int]) -> list[StateBytes]:
    """What each of these ranks will hold from its first step to its last; an evaluation alone, its weights."""
    plan, model, owners = stages_of(config), MetaModel.of(config), shards(config, grid)
    by_stage: dict[int, StateBytes] = {}
    every = []
    for rank in ranks:
        pp = grid.coordinate(rank)["pp"]
        if pp not in by_stage:
            state = state_of_rank(config, model, plan, pp, owners)
            by_stage[pp] = StateBytes(state.weights, 0, 0) if config.eval.skip_train else state
        every.append(by_stage[pp])
    return every


def room_of(config: RunConfig, env: LaunchEnvironment) -> Room | None:
    """Return what this rank's device has; None where nothing can be said of it."""
    found = Hardware.detect()
    device, choice = choose_rank_device(env, config.layout.distributed_backend, found)
    if choice.problem:  # which the job will say
        return None
    if device.type != "cuda":
        there = host_memory()
        return None if there is None else Room(there.free, there.description, own=False)
    free, capacity = torch.cuda.mem_get_info(device)
    if found.gpus < env.local_size and choice.backend != "nccl":  # shared, and others may have allocated already
        return Room(capacity, f"the GPU has {format_gib(capacity)}", own=True)
    return Room(free, f"GPU {device.index} has {format_gib(capacity)}, of which {format_gib(free)} are free", own=True)


def _advice(config: RunConfig) -> str:
    """The flags that make a rank's state smaller, of those that are not used yet."""
    flags = ["a smaller model (--num-layers, --hidden-size)", "more GPUs or hosts with a larger --tensor-model-parallel-size"]
    flags += ["--pipeline-model-parallel-size"]
    if not config.layout.use_distributed_optimizer:
        flags.append("--use-distributed-optimizer")
    return f"{', '.join(flags[:-1])} or {flags[-1]}"
