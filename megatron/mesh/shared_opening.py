"""Open the memory that ranks of a host share: agree on who is where, map one segment, lay the channels of groups out in it."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from megatron.mesh.shared_collectives import SharedGroup
from megatron.mesh.shared_memory import (
    MAX_BYTES,
    MAX_SLOTS,
    MIN_SLOTS,
    SLOT,
    Channel,
    Neighbors,
    SharedSegment,
    host_identity,
    unsupported,
)

Ranks = tuple[int, ...]


def open_shared_groups(groups: Sequence[Ranks], rank: int, timeout: timedelta | None) -> dict[Ranks, SharedGroup]:
    """Return the groups of this rank that can use shared memory: those of two ranks or more that all run on this host.

    None of a job on GPUs, whose tensors do not lie in host memory.
    Where a process cannot open the memory of its host, no group of any host uses it, and the first rank says why. Collective.

    Args:
        groups: global ranks of every group of the job, the same list on all ranks.
        rank: this rank.
        timeout: of an operation; None for none.
    """
    if max(map(len, groups)) == 1 or dist.get_backend() != "gloo":
        return {}
    identity, file, problem = _offer_file()
    try:
        everyone = _gather((identity, os.getpid(), file))
        here = [other for other, (host, _, _) in enumerate(everyone) if host == everyone[rank][0]]
        inside = [ranks for ranks in groups if len(ranks) > 1 and set(ranks) <= set(here)]
        memory = None
        if inside and problem is None:
            try:
                memory = _open(
                    Neighbors(tuple(here), tuple(everyone[other][1] for other in here), rank), inside, everyone[here[0]]
                )
            except (OSError, ValueError) as error:
                problem = f"rank {rank} cannot open the memory of rank {here[0]}: {error}"
        problems = [text for text in _gather(problem) if text]
    finally:
        if file >= 0:
            os.close(file)
    if problems and rank == 0:
        print(f"note: ranks of one host talk through gloo, not through shared memory: {problems[0]}", file=sys.stderr)
    if problems or memory is None:
        return {}
    return _lay_out(memory, inside, timeout)


def _offer_file() -> tuple[str, int, str | None]:
    """Return this host's identity, a file in memory, and None; or "", -1, and why this process cannot share memory.

    Every rank offers a file, since none knows yet which of them is the first of its host. An empty one costs nothing.
    """
    if problem := unsupported():
        return "", -1, problem
    try:
        return host_identity(), os.memfd_create("megatron", os.MFD_CLOEXEC), None
    except OSError as error:
        return "", -1, str(error)


def _gather(value: Any) -> list[Any]:
    """Return the values of all ranks, in their order."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _open(neighbors: Neighbors, groups: Sequence[Ranks], first: tuple[str, int, int]) -> SharedSegment:
    """Map the file of the first rank of this host, large enough for all groups on it.

    Args:
        neighbors: the ranks of this host.
        groups: global ranks of those that lie on this host.
        first: what the first rank of the host told of itself: its host, process and file.
    """
    _, process, number = first
    file = os.open(f"/proc/{process}/fd/{number}", os.O_RDWR | os.O_CLOEXEC)
    try:
        size = SharedSegment.bells_bytes(len(neighbors.ranks)) + sum(
            2 * _pairs(ranks) * _channel_bytes(ranks) for ranks in groups
        )
        os.ftruncate(file, size)  # by each of them, to the same size
        return SharedSegment(neighbors, file, size)
    finally:
        os.close(file)


def _pairs(ranks: Ranks) -> int:
    """Return the number of ordered pairs of a group's ranks."""
    return len(ranks) * (len(ranks) - 1)


def _slots(ranks: Ranks) -> int:
    """Return the slots of each channel of a group."""
    return max(MIN_SLOTS, min(MAX_SLOTS, MAX_BYTES // (2 * _pairs(ranks) * SLOT)))


def _channel_bytes(ranks: Ranks) -> int:
    return Channel.bytes_for(_slots(ranks))


def _lay_out(memory: SharedSegment, groups: Sequence[Ranks], timeout: timedelta | None) -> dict[Ranks, SharedGroup]:
    """Return this rank's groups, each with its ends of the channels.

    Args:
        memory: of this host.
        groups: global ranks of those that lie on this host, in an order that is the same on all ranks.
        timeout: of an operation.
    """
    rank, offset = memory.neighbors.rank, SharedSegment.bells_bytes(len(memory.neighbors.ranks))
    found: dict[Ranks, SharedGroup] = {}
    for ranks in groups:
        ends: dict[str, dict[int, Channel]] = {name: {} for name in ("to", "by", "sends", "receives")}
        # For each ordered pair a channel for collectives and one for transfers.
        for outward, inward in (("to", "by"), ("sends", "receives")):
            for writer in ranks:
                for reader in ranks:
                    if writer == reader:
                        continue
                    if rank == writer:
                        ends[outward][ranks.index(reader)] = memory.channel(offset, _slots(ranks), reader)
                    elif rank == reader:
                        ends[inward][ranks.index(writer)] = memory.channel(offset, _slots(ranks), writer)
                    offset += _channel_bytes(ranks)
        if rank in ranks:
            found[ranks] = SharedGroup(memory, ranks, timeout, **ends)
    return found
