"""Broadcast rank 0's commands to all ranks, and let all know whether one of them was asked to stop.

These are small collectives over all ranks, on a process group of their own. Rank 0 calls them at least every half second, even
without requests, so that no rank waits until the timeout of a collective.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron.mesh.mesh import Axis
from megatron.parallel.collectives import all_reduce


@dataclass(frozen=True)
class Command:
    """The outcome of one exchange, the same on all ranks.

    Attributes:
        payload: rank 0's data; empty for none.
        stop: some rank was asked to stop.
    """

    payload: bytes
    stop: bool


class Control:
    """The exchange of commands on one rank. Collective: all ranks create one, and call `exchange` equally often."""

    def __init__(self, world: Axis, timeout: timedelta | None = None) -> None:
        self.axis = world
        if world.group is not None:
            # The tensors are in host memory, so the group uses gloo even in a job with NCCL.
            group = dist.new_group(list(world.ranks), timeout=timeout, backend="gloo")
            self.axis = replace(world, name="control", group=group)

    @property
    def is_leader(self) -> bool:
        """True on the rank that the others follow."""
        return self.axis.first

    def exchange(self, payload: bytes = b"", *, stop: bool = False) -> Command:
        """Exchange rank 0's data and all ranks' requests to stop. Collective.

        Args:
            payload: rank 0's data; ignored on the others.
            stop: this rank was asked to stop.
        """
        if self.axis.size == 1:
            return Command(payload, stop)
        header = torch.tensor([len(payload), stop] if self.is_leader else [0, stop], dtype=torch.int64)  # [2]
        # The maximum: the length is rank 0's, since the others have 0; one rank's stop is enough.
        length, asked = map(int, all_reduce(header, self.axis, "max").tolist())
        if length:
            buffer = torch.zeros(length, dtype=torch.uint8)  # [length]
            if self.is_leader:
                buffer.copy_(torch.frombuffer(bytearray(payload), dtype=torch.uint8))
            dist.broadcast(buffer, self.axis.ranks[0], group=self.axis.group)
            payload = bytes(buffer.tolist())
        return Command(payload, bool(asked))
