"""Tell all ranks what rank 0 has to do, and hear which of them were asked to end.

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

NOTHING, GO_ON, DROP, TASK = range(4)  # no work; continue the task; abandon it; begin the one in the payload


@dataclass(frozen=True)
class Command:
    """The outcome of one exchange, the same on all ranks.

    Attributes:
        command: rank 0's: NOTHING, GO_ON, DROP or TASK.
        payload: with TASK, the task.
        stop: some rank has been asked to end.
    """

    command: int
    payload: bytes
    stop: bool


class Control:
    """One rank's end of the exchange. Collective: all ranks make one, and call `exchange` equally often."""

    def __init__(self, world: Axis, timeout: timedelta | None = None) -> None:
        self.axis = world
        if world.group is not None:
            # What travels lies in host memory, so it is gloo's under NCCL too.
            group = dist.new_group(list(world.ranks), timeout=timeout, backend="gloo")
            self.axis = replace(world, name="control", group=group)

    @property
    def is_leader(self) -> bool:
        """True on the rank that the others follow."""
        return self.axis.first

    def exchange(self, command: int = NOTHING, payload: bytes = b"", *, stop: bool = False) -> Command:
        """Exchange a command and the wish to stop. Collective.

        Args:
            command: what rank 0 tells; ignored on the others.
            payload: what rank 0 sends with it; ignored on the others.
            stop: this rank has been asked to end.
        """
        if self.axis.size == 1:
            return Command(command, payload, stop)
        told = torch.tensor([command, len(payload), stop] if self.is_leader else [0, 0, stop], dtype=torch.int64)  # [3]
        # The maximum gives rank 0's numbers, the others' are 0, and the wish of any rank.
        command, length, asked = map(int, all_reduce(told, self.axis, "max").tolist())
        if length:
            room = torch.zeros(length, dtype=torch.uint8)  # [length]
            if self.is_leader:
                room.copy_(torch.frombuffer(bytearray(payload), dtype=torch.uint8))
            dist.broadcast(room, self.axis.ranks[0], group=self.axis.group)
            payload = bytes(room.tolist())
        return Command(command, payload, bool(asked))
