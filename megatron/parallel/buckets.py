"""Buckets of flat memory: which parameters lie together in one, and where. Pure: sizes in, places out.

A bucket is the unit of communication: its gradients are summed over the data-parallel ranks in one collective, and under
the distributed optimizer each of these ranks owns one contiguous slice of it. The memory arithmetic of `plan/state_size.py` and
the buffers of `optim/buffers.py` both read the places off here.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ALIGN = 64  # elements: every parameter and every slice starts on a 256-byte line in fp32


@dataclass(frozen=True)
class Bucket:
    """Parameters that lie together in flat memory.

    Attributes:
        members: numbers of parameters, in the order in which they lie.
        offsets: where each begins, in elements.
        length: of the bucket in elements, padding included; a multiple of ALIGN times the ranks that share it.
    """

    members: tuple[int, ...]
    offsets: tuple[int, ...]
    length: int


def buckets(
    sizes: Sequence[int],
    kinds: Sequence[Hashable],
    limit: int | None = None,
    shards: int | Mapping[Any, int] = 1,
    whole: Collection[Hashable] = (),
) -> list[Bucket]:
    """Return the buckets of a rank's parameters, in the order in which the backward pass completes them.

    Parameters lie in the reverse of the forward order, as their gradients come.

    Args:
        sizes: elements of each parameter, in the order of the forward pass.
        kinds: of each parameter; those of different kinds never share a bucket.
        limit: elements that a bucket should not exceed; a larger parameter has one of its own.
        shards: ranks that each own a slice of a bucket, of every one or by its kind.
        whole: kinds whose parameters no slice may cut. Where ranks own slices, all of such a kind share one bucket, since
            one with fewer parameters than ranks would be padding for the most part; and they lie where there is most room.
    """
    share = shards if isinstance(shards, Mapping) else dict.fromkeys(kinds, shards)
    shared_out = {kind for kind in whole if share.get(kind, 1) > 1}
    filling: dict[Hashable, list[int]] = {}
    filled: dict[Hashable, int] = {}  # elements of those
    done: list[list[int]] = []
    for number in reversed(range(len(sizes))):
        kind, size = kinds[number], round_up(sizes[number])
        if kind in filling and limit is not None and kind not in shared_out and filled[kind] + size > limit:
            done.append(filling.pop(kind))
            filled[kind] = 0
        filling.setdefault(kind, []).append(number)
        filled[kind] = filled.get(kind, 0) + size
    done += filling.values()
    found = []
    for members in sorted(done, key=lambda members: -members[-1]):
        kind = kinds[members[0]]
        lay_out = _laid_out_whole if kind in shared_out else _laid_out
        found.append(lay_out(members, sizes, share[kind]))
    return found


def round_up(size: int, step: int = ALIGN) -> int:
    """Return `size`, rounded up to a multiple of `step`."""
    return -(-size // step) * step


def _laid_out(members: Sequence[int], sizes: Sequence[int], shards: int) -> Bucket:
    offsets, length = [], 0
    for number in members:
        offsets.append(length)
        length += round_up(sizes[number])
    return Bucket(tuple(members), tuple(offsets), round_up(length, ALIGN * shards))


def _laid_out_whole(members: Sequence[int], sizes: Sequence[int], shards: int) -> Bucket:
    """Give each parameter to one slice, the largest first and each to the emptiest; all slices are as long as the fullest."""
    held: list[list[int]] = [[] for _ in range(shards)]
    filled = [0] * shards
    for number in sorted(members, key=lambda number: -sizes[number]):
        shard = filled.index(min(filled))
        held[shard].append(number)
        filled[shard] += round_up(sizes[number])
    numbers, offsets = [], []
    for shard, own in enumerate(held):
        offset = shard * max(filled)
        for number in own:
            numbers.append(number)
            offsets.append(offset)
            offset += round_up(sizes[number])
    return Bucket(tuple(numbers), tuple(offsets), max(filled) * shards)
