"""Layout of flat memory: which parameters share a bucket, and their offsets in it. Pure.

A bucket is the unit of communication: its gradients are summed over the data-parallel ranks in one collective, and under
the distributed optimizer each of these ranks owns one contiguous slice of it. The buffers of `optim/buffers.py` and the memory
estimate of `plan/state_size.py` use the same layout.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ALIGN = 64  # in elements: every parameter and every slice starts at a multiple of 256 bytes in fp32


@dataclass(frozen=True)
class Bucket:
    """Parameters that share one flat tensor.

    Attributes:
        members: indices of the parameters, in the order of the flat tensor.
        offsets: index of each parameter's first element in the flat tensor.
        length: number of elements, including padding; a multiple of ALIGN times the number of ranks that own slices.
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

    In a bucket, parameters are in the reverse of the forward order, which is the order of their gradients.

    Args:
        sizes: number of elements of each parameter, in the order of the forward pass.
        kinds: kind of each parameter; parameters of different kinds never share a bucket.
        limit: maximum number of elements of a bucket; a larger parameter gets its own bucket.
        shards: number of ranks that each own a slice of a bucket, for all kinds or for each kind.
        whole: kinds whose parameters no slice may cut. If ranks own slices, all parameters of such a kind share one bucket,
            because a bucket with fewer parameters than ranks would be mostly padding, and their order balances the slices.
    """
    shards_by_kind = shards if isinstance(shards, Mapping) else dict.fromkeys(kinds, shards)
    uncut = {kind for kind in whole if shards_by_kind.get(kind, 1) > 1}
    open_members: dict[Hashable, list[int]] = {}  # for each kind, members of the bucket that is being filled
    open_sizes: dict[Hashable, int] = {}  # elements of the members
    closed: list[list[int]] = []
    for number in reversed(range(len(sizes))):
        kind, size = kinds[number], round_up(sizes[number])
        if kind in open_members and limit is not None and kind not in uncut and open_sizes[kind] + size > limit:
            closed.append(open_members.pop(kind))
            open_sizes[kind] = 0
        open_members.setdefault(kind, []).append(number)
        open_sizes[kind] = open_sizes.get(kind, 0) + size
    closed += open_members.values()
    result = []
    for members in sorted(closed, key=lambda members: -members[-1]):
        kind = kinds[members[0]]
        lay_out = _lay_out_uncut if kind in uncut else _lay_out
        result.append(lay_out(members, sizes, shards_by_kind[kind]))
    return result


def round_up(size: int, step: int = ALIGN) -> int:
    """Return `size`, rounded up to a multiple of `step`."""
    return -(-size // step) * step


def _lay_out(members: Sequence[int], sizes: Sequence[int], shards: int) -> Bucket:
    offsets, length = [], 0
    for number in members:
        offsets.append(length)
        length += round_up(sizes[number])
    return Bucket(tuple(members), tuple(offsets), round_up(length, ALIGN * shards))


def _lay_out_uncut(members: Sequence[int], sizes: Sequence[int], shards: int) -> Bucket:
    """Assign each parameter to one slice: in descending order of size, to the slice with the fewest elements so far."""
    slice_members: list[list[int]] = [[] for _ in range(shards)]
    slice_sizes = [0] * shards
    for number in sorted(members, key=lambda number: -sizes[number]):
        shard = slice_sizes.index(min(slice_sizes))
        slice_members[shard].append(number)
        slice_sizes[shard] += round_up(sizes[number])
    slice_length = max(slice_sizes)  # the shorter slices are padded
    numbers, offsets = [], []
    for shard, own in enumerate(slice_members):
        offset = shard * slice_length
        for number in own:
            numbers.append(number)
            offsets.append(offset)
            offset += round_up(sizes[number])
    return Bucket(tuple(numbers), tuple(offsets), slice_length * shards)
