"""Collectives and transfers of one group of ranks that share a host, through channels of shared memory.

Sums are formed in the order of the ranks, whoever comes first, so a run gives the same bits each time and every rank has the
same. Below, n stands for the ranks of the group; tensors are contiguous, on the host, and their shapes do not matter here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta

import torch
from torch import Tensor

from megatron.mesh.shared_memory import SLOT, Channel, Operation, SharedSegment, Steps

Combine = Callable[..., Tensor]  # torch.add or torch.maximum, which take `out`
DIRECT_BYTES = 64 << 10  # up to here each rank of three or more sums everything itself, which saves a round of waiting


class SharedWork:
    """An operation under way. `wait()` ends when this rank's part of it is done."""

    def __init__(self, group: SharedGroup, operation: Operation, ranks: Sequence[int]) -> None:
        self._group, self._operation, self._ranks = group, operation, ranks

    def is_completed(self) -> bool:
        """Return whether this rank's part is done."""
        return self._operation.done

    def wait(self) -> None:
        """Wait until this rank's part is done; RuntimeError where another rank has ended, or time is up."""
        if not self._operation.done:
            self._group.memory.wait(self._operation, self._ranks, self._group.timeout)


class SharedGroup:
    """The ranks of one process group, all on this host.

    Args:
        memory: this host's segment.
        ranks: global ranks of the group, in its order.
        timeout: of an operation; None for none.
        to: by the position in the group, the channels to the other ranks for collectives.
        by: the same, from them.
        sends: the channels to them for transfers between two ranks.
        receives: the same, from them.
    """

    def __init__(
        self,
        memory: SharedSegment,
        ranks: Sequence[int],
        timeout: timedelta | None,
        *,
        to: Mapping[int, Channel],
        by: Mapping[int, Channel],
        sends: Mapping[int, Channel],
        receives: Mapping[int, Channel],
    ) -> None:
        self.memory, self.ranks, self.timeout = memory, tuple(ranks), timeout
        self.size, self.rank = len(ranks), ranks.index(memory.neighbors.rank)
        self._to, self._by, self._sends, self._receives = to, by, sends, receives
        # Every rank calls a group's collectives in one order. Transfers are ordered by direction and pair alone: a send that
        # finds no room must not keep a receive waiting, for which the other rank may be waiting too.
        self._collectives = memory.queue()
        self._transfers: dict[tuple[str, int], deque[Operation]] = {
            (way, peer): memory.queue() for way in ("send", "receive") for peer in sends
        }

    def _start(self, steps: Steps) -> SharedWork:
        operation = Operation(steps)
        self.memory.start(self._collectives, operation)
        return SharedWork(self, operation, self.ranks)

    def all_reduce(self, x: Tensor, combine: Combine = torch.add) -> SharedWork:
        """Start to combine `x` over the group, in place."""
        flat = x.detach().view(-1)
        if self.size == 2 or flat.numel() * flat.element_size() <= DIRECT_BYTES:
            return self._start(self._reduce([flat] * self.size, flat, combine))
        shares = flat.tensor_split(self.size)
        return self._start(self._reduce_and_gather(shares, combine))

    def reduce_scatter(self, x: Tensor, share: Tensor) -> SharedWork:
        """Start to sum `x` over the group, of which this rank's share goes to `share`; that may be a part of `x`."""
        return self._start(self._reduce(x.detach().view(-1).chunk(self.size), share.detach().view(-1), torch.add))

    def all_gather(self, x: Tensor, whole: Tensor) -> SharedWork:
        """Start to join the ranks' `x` in `whole`; this rank's may be a part of it already."""
        shares = whole.detach().view(-1).chunk(self.size)
        if shares[self.rank].data_ptr() != x.data_ptr():
            shares[self.rank].copy_(x.detach().view(-1))
        return self._start(self._gather(shares))

    def broadcast(self, x: Tensor, source: int) -> SharedWork:
        """Start to give every rank the `x` of the rank at position `source`."""
        flat = x.detach().view(-1)
        return self._start(self._from_one(flat, source))

    def ring_shift(self, x: Tensor, room: Tensor) -> SharedWork:
        """Start to pass `x` to the next rank, and to get the like of it from the rank before into `room`."""
        return self._start(self._shift(x.detach().view(-1), room.detach().view(-1)))

    def send(self, x: Tensor, peer: int) -> SharedWork:
        """Start to send `x` to the rank at position `peer`; it must stay as it is until the work is done."""
        operation = Operation(_send(self._sends[peer], x.detach().view(-1)))
        self.memory.start(self._transfers["send", peer], operation)
        return SharedWork(self, operation, (self.ranks[peer],))

    def receive(self, room: Tensor, peer: int) -> SharedWork:
        """Start to receive into `room` what the rank at position `peer` sends."""
        operation = Operation(_receive(self._receives[peer], room.detach().view(-1)))
        self.memory.start(self._transfers["receive", peer], operation)
        return SharedWork(self, operation, (self.ranks[peer],))

    def _reduce(self, shares: Sequence[Tensor], out: Tensor, combine: Combine) -> Steps:
        """Give every rank its share, and combine all ranks' pieces of the own one in the order of ranks.

        Args:
            shares: for each rank what it gets of this rank's tensor, `[m]`; they may be the same.
            out: for the combination of this rank's share, `[m]`.
            combine: of two tensors.
        """
        own = shares[self.rank]
        rounds = max(map(_pieces, shares))

        def take(number: int) -> None:
            mine, result = _piece(own, number), _piece(out, number)
            parts = [mine if rank == self.rank else self._by[rank].peek(mine) for rank in range(self.size)]
            if self.size == 2:
                combine(parts[0], parts[1], out=result)
                return
            # The result may be one of the parts, so it is written last.
            total = combine(parts[0], parts[1])
            for part in parts[2:-1]:
                combine(total, part, out=total)
            combine(total, parts[-1], out=result)

        return self._exchange(rounds, lambda rank, number: _piece(shares[rank], number), take)

    def _gather(self, shares: Sequence[Tensor]) -> Steps:
        """Give every rank the own share, and fill the others': `shares`, each `[m]`."""

        def take(number: int) -> None:
            for rank, channel in self._by.items():
                piece = _piece(shares[rank], number)
                piece.copy_(channel.peek(piece))

        own = shares[self.rank]
        return self._exchange(max(map(_pieces, shares)), lambda rank, number: _piece(own, number), take)

    def _reduce_and_gather(self, shares: Sequence[Tensor], combine: Combine) -> Steps:
        """Combine each rank's share at that rank, then give it to all: less to read than if every rank combined everything."""
        yield from self._reduce(shares, shares[self.rank], combine)
        yield from self._gather(shares)

    def _exchange(self, rounds: int, outgoing: Callable[[int, int], Tensor], take: Callable[[int], None]) -> Steps:
        """Write a message to every other rank and take one from each, so many times.

        Args:
            rounds: number of messages to each rank.
            outgoing: gives the message to a rank in a round, `[k]`.
            take: uses the messages of a round, once all are there and the own ones of that round have been written.
        """
        written = taken = 0
        while taken < rounds:
            if written < rounds and all(channel.has_room() for channel in self._to.values()):
                for rank, channel in self._to.items():
                    channel.write(outgoing(rank, written))
                written += 1
            elif taken < written and all(channel.has_message() for channel in self._by.values()):
                take(taken)
                for channel in self._by.values():
                    channel.release()
                taken += 1
            else:
                yield

    def _from_one(self, x: Tensor, source: int) -> Steps:
        """Write `x` `[m]` to all ranks, on the one at position `source`; read it on the others."""
        if self.rank != source:
            yield from _receive(self._by[source], x)
            return
        for number in range(_pieces(x)):
            while not all(channel.has_room() for channel in self._to.values()):
                yield
            for channel in self._to.values():
                channel.write(_piece(x, number))

    def _shift(self, x: Tensor, room: Tensor) -> Steps:
        """Write `x` to the next rank while `room` is read from the one before, both `[m]`."""
        sending = Operation(_send(self._to[(self.rank + 1) % self.size], x))
        receiving = Operation(_receive(self._by[(self.rank - 1) % self.size], room))
        # Both are moved each time: to send everything first, every rank would need a free ring.
        while not (sending.move() & receiving.move()):
            yield


def _send(channel: Channel, x: Tensor) -> Steps:
    """Write `x` `[m]` to a channel, piece by piece."""
    for number in range(_pieces(x)):
        while not channel.has_room():
            yield
        channel.write(_piece(x, number))


def _receive(channel: Channel, room: Tensor) -> Steps:
    """Fill `room` `[m]` from a channel, piece by piece."""
    for number in range(_pieces(room)):
        while not channel.has_message():
            yield
        piece = _piece(room, number)
        piece.copy_(channel.peek(piece))
        channel.release()


def _pieces(x: Tensor) -> int:
    """Return the number of slots that `x` fills."""
    return -(-x.numel() * x.element_size() // SLOT)


def _piece(x: Tensor, number: int) -> Tensor:
    """Return the part of `x` `[m]` that goes into one slot; empty behind its end."""
    step = SLOT // x.element_size()
    return x[number * step : (number + 1) * step]
