"""What rank 0 tells the others between two pieces of work, and what they wish.

Small collectives over all ranks, on a process group of their own. Rank 0 speaks at least every half second, also while no
request comes, so that nobody ever waits as long as a collective may take.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron.mesh.mesh import Axis
from megatron.parallel.collectives import all_reduce

NOTHING, GO_ON, DROP, TASK = range(4)


@dataclass(frozen=True)
class Word:
    """command: rank 0's. payload: with TASK, what is to be done. stop: some rank has been asked to end."""

    command: int
    payload: bytes
    stop: bool


class Control:
    """One rank's end. Collective: all ranks make one, and call `exchange` equally often."""

    def __init__(self, world: Axis, timeout: timedelta | None = None) -> None:
        self.axis = world
        if world.group is not None:
            # What travels lies in host memory, so it is gloo's under NCCL too.
            group = dist.new_group(list(world.ranks), timeout=timeout, backend="gloo")
            self.axis = replace(world, name="control", group=group)

    @property
    def leads(self) -> bool:
        """Whether this is the rank that the others follow."""
        return self.axis.first

    def exchange(self, command: int = NOTHING, payload: bytes = b"", *, stop: bool = False) -> Word:
        """Tell, where this is rank 0, and hear. stop: this rank has been asked to end."""
        if self.axis.size == 1:
            return Word(command, payload, stop)
        told = torch.tensor([command, len(payload), stop] if self.leads else [0, 0, stop], dtype=torch.int64)
        command, length, asked = map(int, all_reduce(told, self.axis, "max").tolist())
        if length:
            room = torch.zeros(length, dtype=torch.uint8)
            if self.leads:
                room.copy_(torch.frombuffer(bytearray(payload), dtype=torch.uint8))
            dist.broadcast(room, self.axis.ranks[0], group=self.axis.group)
            payload = bytes(room.tolist())
        return Word(command, payload, bool(asked))
