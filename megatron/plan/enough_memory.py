"""Refuse a run whose state cannot fit into memory, before anything is allocated.

Only what is certain is compared with the memory that the device reports: a rank's weights, gradients and optimizer state,
whose bytes are exact, without activations. A run that passes may still run out of memory.
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

RELEASE_SECONDS = 10.0  # how long to wait for GPU memory that a finished run is still releasing
LOWER_MEMORY = (
    "lower --micro-batch-size, --seq-length, --num-layers or --hidden-size, store fewer activations with "
    "--recompute-activations, or divide the memory among more ranks with --tensor-model-parallel-size, "
    "--pipeline-model-parallel-size or --use-distributed-optimizer"
)


@dataclass(frozen=True)
class FreeMemory:
    """Memory that a rank's device has left.

    Attributes:
        bytes: free bytes, or the whole capacity of a GPU that several ranks share.
        description: the same as text, for a message.
        per_rank: compare `bytes` with the needs of this rank only (a GPU), not with those of all ranks of this host.
    """

    bytes: int
    description: str
    per_rank: bool


def check_memory(
    config: RunConfig,
    env: LaunchEnvironment,
    measure: Callable[[RunConfig, LaunchEnvironment], FreeMemory | None] | None = None,
) -> None:
    """Check that weights, gradients and optimizer state fit into memory. Call this before any rank allocates.

    Args:
        config: the run's configuration, with vocab_size set.
        env: this process's launch environment.
        measure: returns the device's free memory, or None if it is unknown; by default `free_memory`.

    Raises:
        InputError: the state does not fit. The message gives the bytes needed, the bytes available, and flags that help.
    """
    grid = Grid.from_layout(config.layout, env.world_size)
    measure = measure or free_memory
    free = measure(config, env)
    if free is None or (env.local_rank and not free.per_rank):  # local rank 0 checks for all ranks of its host
        return
    states = rank_states(config, grid, [env.rank] if free.per_rank else range(env.world_size))
    if not free.per_rank and env.launcher == "srun":
        # srun may distribute the ranks over the hosts in any order: this host needs at least the smallest states.
        states = sorted(states, key=lambda state: state.total)[: env.local_size]
    elif not free.per_rank:
        states = states[env.rank - env.local_rank :][: env.local_size]
    needed = sum(state.total for state in states)
    if free.per_rank:  # wait for memory that a finished run is still releasing
        deadline = time.monotonic() + RELEASE_SECONDS
        while needed > free.bytes and time.monotonic() < deadline:
            time.sleep(0.5)
            free = measure(config, env) or free
    if needed > free.bytes:
        largest = max(states, key=lambda state: state.total)
        parts = [f"weights {format_gib(largest.weights)}"]
        if not config.eval.skip_train:
            parts += [f"gradients {format_gib(largest.gradients)}", f"optimizer {format_gib(largest.optimizer)}"]
        who = "this rank" if free.per_rank else "one process" if len(states) == 1 else f"the {len(states)} ranks of this host"
        raise InputError(
            f"out of memory before the start: {who} would hold {format_gib(needed)} without activations "
            f"({'on the rank that needs most: ' if len(states) > 1 else ''}{', '.join(parts)}), and {free.description}. "
            f"--dry-run shows what each rank needs; to need less per rank, use {_advice(config)}"
        )


def rank_states(config: RunConfig, grid: Grid, ranks: Sequence[int]) -> list[StateBytes]:
    """Return the bytes that ranks hold throughout the run; with --skip-train weights only.

    Args:
        config: the run's configuration, with vocab_size set.
        grid: the grid of all ranks of the run.
        ranks: global numbers of the ranks to compute.

    Returns:
        One entry for each of `ranks`, in their order.
    """
    plan, model, shards = plan_stages(config), MetaModel.from_config(config), optimizer_shards(config, grid)
    state_by_pp: dict[int, StateBytes] = {}  # a job may have thousands of ranks, but those of one pipeline rank are alike
    states = []
    for rank in ranks:
        pp = grid.coordinate(rank)["pp"]
        if pp not in state_by_pp:
            state = rank_state(config, model, plan, pp, shards)
            state_by_pp[pp] = StateBytes(state.weights, 0, 0) if config.eval.skip_train else state
        states.append(state_by_pp[pp])
    return states


def free_memory(config: RunConfig, env: LaunchEnvironment) -> FreeMemory | None:
    """Return the free memory of this rank's device, or None if it is unknown."""
    hardware = Hardware.detect()
    device, choice = choose_rank_device(env, config.layout.distributed_backend, hardware)
    if choice.problem:  # reported later by the job
        return None
    if device.type != "cuda":
        host = host_memory()
        return None if host is None else FreeMemory(host.free, host.description, per_rank=False)
    free, capacity = torch.cuda.mem_get_info(device)
    # Ranks that share a GPU may have allocated already, so what is free says nothing about the run.
    if hardware.gpus < env.local_size and choice.backend != "nccl":
        return FreeMemory(capacity, f"the GPU has {format_gib(capacity)}", per_rank=True)
    return FreeMemory(
        free, f"GPU {device.index} has {format_gib(capacity)}, of which {format_gib(free)} are free", per_rank=True
    )


def _advice(config: RunConfig) -> str:
    """Return the flags that make a rank's state smaller, without --use-distributed-optimizer if the run has it already."""
    flags = ["a smaller model (--num-layers, --hidden-size)", "more GPUs or hosts with a larger --tensor-model-parallel-size"]
    flags += ["--pipeline-model-parallel-size"]
    if not config.layout.use_distributed_optimizer:
        flags.append("--use-distributed-optimizer")
    return f"{', '.join(flags[:-1])} or {flags[-1]}"
