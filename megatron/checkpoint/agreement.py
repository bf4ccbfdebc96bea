"""Communication of the ranks about a checkpoint: small descriptions and failures, never tensor data."""

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

# A rank waits for the slowest disk. What dies or hangs meanwhile is found by the watchdog, not by this.
MAX_WAIT = timedelta(days=1)


class DiskError(CheckpointError):
    """A checkpoint could not be written because the disk is full, or fails. Nothing is wrong with the run."""


def saving_axis(world: Axis) -> Axis:
    """Return the ranks of `world` with a process group for checkpoints alone, which a thread may use. Collective."""
    if world.group is None:
        return world
    # A group of its own, since two threads must never share one: a save may communicate while the step does. It is gloo's under
    # NCCL too: what travels lies in host memory, and so a slow disk never counts as a failed collective of the device.
    return replace(world, name="save", group=dist.new_group(list(world.ranks), timeout=MAX_WAIT, backend="gloo"))


def run_on_all_ranks(world: Axis, work: Callable[[], T], watch: Watchdog | None = None, what: str = "") -> T:
    """Run `work` on every rank, and fail on all of them when it fails on one. Collective.

    Args:
        world: all ranks that take part.
        work: what each rank does, without communication.
        watch: learns what this rank is busy with.
        what: the work in words, for `watch`.

    Returns:
        This rank's result.

    Raises:
        DiskError: on every rank, where all that failed is the disk's fault.
        CheckpointError: on every rank, for any other failure; the message names each rank that failed, and its error.
    """
    watch = watch or Watchdog()
    result, failure = None, None
    watch.doing(what, alone=True)
    try:
        result = work()
    except Exception as error:  # whatever it is, the other ranks must not wait for this one
        kind = DiskError if isinstance(error, OSError | DiskError) else CheckpointError
        if world.group is None:
            raise error if isinstance(error, CheckpointError) else kind(describe_error(error)) from error
        failure = (describe_error(error), kind is DiskError)
    if world.group is not None:
        failures: list[tuple[str, bool] | None] = [None] * world.size
        watch.waiting(f"waiting for the other ranks after {what}")
        dist.all_gather_object(failures, failure, group=world.group)
        # One sentence for all ranks that met the same error: a full disk fails on a thousand at once.
        told = {f: [r for r, other in enumerate(failures) if other == f] for f in failures if f is not None}
        if told:
            kind = DiskError if all(disk for _, disk in told) else CheckpointError
            raise kind("; ".join(f"rank {', '.join(map(str, ranks))}: {text}" for (text, _), ranks in told.items()))
    return result  # type: ignore[return-value]  # None only where work gave None


def describe_error(error: Exception) -> str:
    """Return an error in words; where it is the disk's, with the file."""
    if isinstance(error, CheckpointError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return f"{type(error).__name__}: {error}"


def all_agree(world: Axis, answer: bool) -> bool:
    """Return whether `answer` is true on every rank. Collective."""
    if world.group is None:
        return answer
    # NCCL reduces memory of the device alone.
    device = "cuda" if dist.get_backend(world.group) == "nccl" else "cpu"
    least = torch.tensor(int(answer), device=device)
    dist.all_reduce(least, dist.ReduceOp.MIN, group=world.group)
    return bool(least.item())


def gather_objects(world: Axis, value: T) -> list[T] | None:
    """Return every rank's value on the first rank, None on the others. Collective."""
    if world.group is None:
        return [value]
    values: list[Any] | None = [None] * world.size if world.first else None
    dist.gather_object(value, values, dst=world.ranks[0], group=world.group)
    return values


def scatter_objects(world: Axis, values: Sequence[T]) -> T:
    """Give each rank its value of the first rank's list; the others' lists are not looked at. Collective."""
    if world.group is None:
        return values[0]
    mine: list[Any] = [None]
    dist.scatter_object_list(mine, list(values) if world.first else None, src=world.ranks[0], group=world.group)
    result: T = mine[0]
    return result
