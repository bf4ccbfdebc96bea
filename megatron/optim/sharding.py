"""Conversion of a contiguous slice of a flat buffer to rectangles of the parameters in it. Pure.

Under the distributed optimizer (ZeRO-1, arXiv 1910.02054) a rank owns a range of a bucket's elements, which may begin and end
inside parameters. Checkpoints store only rectangles of named tensors, so that any layout can load them. A range of a flattened
matrix is at most three rectangles: the end of a row, full rows, the beginning of a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod


@dataclass(frozen=True)
class Rectangle:
    """A rectangle of a tensor that is contiguous in the flattened tensor.

    start, shape: of the rectangle in the tensor. first: index of its first element in the flattened tensor.
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
    """The part of a parameter that is in a slice: elements `low` to `high` (exclusive) of the flattened parameter.

    member: the parameter's index in its bucket. slice_offset: index in the slice of the range's first element.
    """

    member: int
    low: int
    high: int
    slice_offset: int


def owned_slice(length: int, shards: int, shard: int) -> slice:
    """Return the slice of a bucket that one rank owns.

    Args:
        length: number of elements of the bucket.
        shards: number of ranks that own a slice each.
        shard: index of the rank among them.

    Raises:
        ValueError: `shards` does not divide `length`.
    """
    if length % shards:
        raise ValueError(f"{length} elements do not divide over {shards} ranks")
    share = length // shards
    return slice(shard * share, (shard + 1) * share)


def param_ranges(offsets: Sequence[int], sizes: Sequence[int], own: slice) -> Iterator[ParamRange]:
    """Yield a range for each parameter that overlaps the slice `own` of a bucket.

    Args:
        offsets: index of each parameter's first element in the bucket.
        sizes: number of elements of each parameter, without padding.
        own: the slice.
    """
    for member, (offset, size) in enumerate(zip(offsets, sizes, strict=True)):
        # Relative to the start of the parameter. `size` excludes its padding.
        low, high = max(own.start - offset, 0), min(own.stop - offset, size)
        if low < high:
            yield ParamRange(member, low, high, offset + low - own.start)


def rectangles(shape: tuple[int, ...], low: int, high: int) -> Iterator[Rectangle]:
    """Yield the rectangles that together are a range of elements of a flattened tensor, in order.

    There is one in a vector, at most three in a matrix, and at most 2n - 1 in a tensor of n dimensions.

    Args:
        shape: shape of the tensor.
        low: first element of the range.
        high: end of the range, exclusive.

    Raises:
        ValueError: the range is not inside the tensor.
    """
    if not 0 <= low <= high <= prod(shape):
        raise ValueError(f"elements {low} to {high} of a tensor of shape {shape}")
    if low == high:
        return
    if len(shape) < 2:
        yield Rectangle((low,) * len(shape), (high - low,) * len(shape), low)
        return
    row = prod(shape[1:])
    begin, end = -(-low // row), high // row  # the full rows; begin > end if the range is inside a single row
    if begin > end:
        yield from _rectangles_in_row(shape, end, low, high)
        return
    if low < begin * row:
        yield from _rectangles_in_row(shape, begin - 1, low, begin * row)
    if begin < end:
        yield Rectangle((begin, *[0] * (len(shape) - 1)), (end - begin, *shape[1:]), begin * row)
    if end * row < high:
        yield from _rectangles_in_row(shape, end, end * row, high)


def _rectangles_in_row(shape: tuple[int, ...], index: int, low: int, high: int) -> Iterator[Rectangle]:
    """Yield the rectangles of a range that is inside row `index`."""
    row_start = index * prod(shape[1:])
    for inner in rectangles(shape[1:], low - row_start, high - row_start):
        yield Rectangle((index, *inner.start), (1, *inner.shape), row_start + inner.first)
