"""A contiguous slice of a flat buffer, as rectangles of the parameters in it. Pure: numbers in, numbers out.

Under the distributed optimizer (ZeRO-1, arXiv 1910.02054) a rank owns elements `low` to `high` of a bucket, wherever
parameters begin and end. A checkpoint knows only rectangles of named tensors, so that it fits every layout. Of a matrix a
slice is at most three: the end of a row, whole rows, the beginning of a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod


@dataclass(frozen=True)
class Rectangle:
    """A rectangle of a tensor that is contiguous in the flattened tensor.

    start, shape: within the tensor, per dimension. first: its first element, counted in the flattened tensor.
    Its elements follow one another in the flattened tensor, `size` of them from `first`.
    """

    start: tuple[int, ...]
    shape: tuple[int, ...]
    first: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)


@dataclass(frozen=True)
class ParamRange:
    """The part of one parameter that lies in a slice: elements `low` to `high` of the flattened parameter.

    member: the parameter's number in its bucket. place: the element of the slice at which the range begins.
    """

    member: int
    low: int
    high: int
    place: int


def owned_slice(length: int, shards: int, shard: int) -> slice:
    """Return the slice of a bucket that one rank owns.

    Args:
        length: of the bucket, in elements.
        shards: number of ranks that share it.
        shard: which of them.

    Raises:
        ValueError: they cannot share it evenly.
    """
    if length % shards:
        raise ValueError(f"{length} elements do not divide over {shards} ranks")
    share = length // shards
    return slice(shard * share, (shard + 1) * share)


def param_ranges(offsets: Sequence[int], sizes: Sequence[int], own: slice) -> Iterator[ParamRange]:
    """Yield a range for each parameter that the slice `own` of a bucket touches.

    Args:
        offsets: where the parameters begin in the bucket, in elements.
        sizes: their elements without padding.
        own: the slice.
    """
    for member, (offset, size) in enumerate(zip(offsets, sizes, strict=True)):
        # Relative to the parameter's begin; `size` leaves its padding out.
        low, high = max(own.start - offset, 0), min(own.stop - offset, size)
        if low < high:
            yield ParamRange(member, low, high, offset + low - own.start)


def rectangles(shape: tuple[int, ...], low: int, high: int) -> Iterator[Rectangle]:
    """Yield a range of elements of a flattened tensor as rectangles, in their order.

    There is one of a vector, at most three of a matrix, at most 2n - 1 of a tensor of n dimensions.

    Args:
        shape: of the tensor.
        low: first element of the range.
        high: end of the range, not in it.

    Raises:
        ValueError: the range leaves the tensor.
    """
    if not 0 <= low <= high <= prod(shape):
        raise ValueError(f"elements {low} to {high} of a tensor of shape {shape}")
    if low == high:
        return
    if len(shape) < 2:
        yield Rectangle((low,) * len(shape), (high - low,) * len(shape), low)
        return
    row = prod(shape[1:])
    begin, end = -(-low // row), high // row  # whole rows, unless the slice lies within one
    if begin > end:
        yield from _within(shape, end, low, high)
        return
    if low < begin * row:
        yield from _within(shape, begin - 1, low, begin * row)
    if begin < end:
        yield Rectangle((begin, *[0] * (len(shape) - 1)), (end - begin, *shape[1:]), begin * row)
    if end * row < high:
        yield from _within(shape, end, end * row, high)


def _within(shape: tuple[int, ...], number: int, low: int, high: int) -> Iterator[Rectangle]:
    """The rectangles of elements that all lie in row `number`."""
    before = number * prod(shape[1:])
    for inner in rectangles(shape[1:], low - before, high - before):
        yield Rectangle((number, *inner.start), (1, *inner.shape), before + inner.first)
