"""Collectives with which the ranks coordinate a checkpoint: they carry small descriptions and errors, never tensor data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron.checkpoint.layout import CheckpointError
from megatron.launch.watchdog import Watchdog
from megatron.mesh.mesh import Axis

T = TypeVar("T")

# Long enough for the slowest disk; the watchdog, not this timeout, finds ranks that die or hang.
MAX_WAIT = timedelta(days=1)


class DiskError(CheckpointError):
    """Reading or writing a checkpoint failed with an OSError, or the disk has too little space for it."""


def saving_axis(world: Axis) -> Axis:
    """Return an axis of the same ranks with a process group reserved for checkpoints, safe to use in a thread. Collective."""
    if world.group is None:
        return world
    # A separate group, because two threads must never share one: a save may communicate during a training step. The backend is
    # gloo even under NCCL: the messages are in host memory, and a slow disk must not time out a collective of the device.
    return replace(world, name="save", group=dist.new_group(list(world.ranks), timeout=MAX_WAIT, backend="gloo"))


def run_on_all_ranks(world: Axis, work: Callable[[], T], watch: Watchdog | None = None, what: str = "") -> T:
    """Run `work` on every rank, and fail on all of them when it fails on one. Collective.

    Args:
        world: all ranks that take part.
        work: what each rank does, without communication.
        watch: watchdog that is told what this rank is doing.
        what: description of the work, for `watch`.

    Returns:
        This rank's result.

    Raises:
        DiskError: on every rank, if every failure is an OSError or a DiskError.
        CheckpointError: on every rank, for any other failure. The message lists each failed rank with its error.
    """
    watch = watch or Watchdog()
    result, failure = None, None
    watch.doing(what, alone=True)
    try:
        result = work()
    except Exception as error:  # any exception: the other ranks must not wait for this one
        error_type = DiskError if isinstance(error, OSError | DiskError) else CheckpointError
        if world.group is None:
            raise error if isinstance(error, CheckpointError) else error_type(describe_error(error)) from error
        failure = (describe_error(error), error_type is DiskError)
    if world.group is not None:
        failures: list[tuple[str, bool] | None] = [None] * world.size
        watch.waiting(f"waiting for the other ranks after {what}")
        dist.all_gather_object(failures, failure, group=world.group)
        # One sentence for all ranks that met the same error: a full disk fails on a thousand at once.
        ranks_by_failure = {f: [rank for rank, other in enumerate(failures) if other == f] for f in failures if f is not None}
        if ranks_by_failure:
            error_type = DiskError if all(disk for _, disk in ranks_by_failure) else CheckpointError
            messages = (f"rank {', '.join(map(str, ranks))}: {text}" for (text, _), ranks in ranks_by_failure.items())
            raise error_type("; ".join(messages))
    return result  # type: ignore[return-value]  # None only if `work` returned None


def describe_error(error: Exception) -> str:
    """Describe an error in one line; an OSError without its number, but with the file's name."""
    if isinstance(error, CheckpointError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return f"{type(error).__name__}: {error}"


def true_on_all_ranks(world: Axis, answer: bool) -> bool:
    """Return whether `answer` is true on every rank. Collective."""
    if world.group is None:
        return answer
    # NCCL can only reduce tensors in device memory.
    device = "cuda" if dist.get_backend(world.group) == "nccl" else "cpu"
    minimum = torch.tensor(int(answer), device=device)
    dist.all_reduce(minimum, dist.ReduceOp.MIN, group=world.group)
    return bool(minimum.item())


def gather_objects(world: Axis, value: T) -> list[T] | None:
    """Return every rank's value on the first rank, None on the others. Collective."""
    if world.group is None:
        return [value]
    values: list[Any] | None = [None] * world.size if world.first else None
    dist.gather_object(value, values, dst=world.ranks[0], group=world.group)
    return values


def scatter_objects(world: Axis, values: Sequence[T]) -> T:
    """Return this rank's element of the first rank's list; the lists of other ranks are ignored. Collective."""
    if world.group is None:
        return values[0]
    mine: list[Any] = [None]
    dist.scatter_object_list(mine, list(values) if world.first else None, src=world.ranks[0], group=world.group)
    result: T = mine[0]
    return result
