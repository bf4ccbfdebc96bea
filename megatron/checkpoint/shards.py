"""Arithmetic of the rectangles that tensors are saved in: what to copy where, who writes what. Pure: numbers in, numbers out.

A tensor lies in a checkpoint as disjoint rectangles ("pieces") that together are the whole. A rank that loads wants one
rectangle of its own, cut for another layout. Everything about going from any layout to any other is here.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron.parallel.spec import Part

Slices = tuple[slice, ...]
MAX_COMPARISONS = 1_000_000  # pairs that are compared to name the two that overlap


@dataclass(frozen=True)
class Copy:
    """Copy from `source` of saved piece number `piece` to `target` of the wanted rectangle, each relative to its own start."""

    piece: int
    source: Slices
    target: Slices

    @property
    def elements(self) -> int:
        """Number of elements that are copied."""
        return prod(s.stop - s.start for s in self.target)


def overlap(piece: int, saved: Part, wanted: Part) -> Copy | None:
    """Return the copy of what one saved piece holds of a wanted rectangle; None when they have no element in common.

    Args:
        piece: number of the saved piece.
        saved: its rectangle of the whole tensor.
        wanted: another rectangle of it.
    """
    source, target = [], []
    # Rectangles meet where their intervals [a, a + n) and [b, b + m) do in every dimension; two scalars always meet.
    for a, n, b, m in zip(saved.start, saved.shape, wanted.start, wanted.shape, strict=True):
        low, high = max(a, b), min(a + n, b + m)
        if low >= high:
            return None
        source.append(slice(low - a, high - a))
        target.append(slice(low - b, high - b))
    return Copy(piece, tuple(source), tuple(target))


def find_copies(wanted: Part, saved: Sequence[Part]) -> list[Copy]:
    """Return the copies that fill `wanted` from pieces that tile the whole tensor (see `coverage_error`).

    ValueError when the pieces leave some of it open.
    """
    # Since pieces are disjoint, the elements that they give are different ones, and counting them is enough.
    found = [c for c in (overlap(i, piece, wanted) for i, piece in enumerate(saved)) if c is not None]
    if sum(c.elements for c in found) != prod(wanted.shape):
        raise ValueError(f"the pieces do not cover {wanted.shape} at {wanted.start}")
    return found


def coverage_error(shape: tuple[int, ...], pieces: Sequence[Part]) -> str | None:
    """Return why `pieces` are no disjoint cover of a tensor of `shape`; None when they are one.

    Takes a time in proportion to the pieces, however they lie: the list can come from a hostile file.
    """
    for piece in pieces:
        if len(piece.start) != len(shape) or len(piece.shape) != len(shape):
            return f"a piece of {len(piece.shape)} dimensions in a tensor of {len(shape)}"
        if any(a < 0 or n < 1 or a + n > whole for a, n, whole in zip(piece.start, piece.shape, shape, strict=True)):
            return f"the piece {piece.shape} at {piece.start} lies outside {shape}"
    if _corners((p.start, p.shape) for p in pieces) == _corners([((0,) * len(shape), shape)]):
        return None
    # Only the message is left to find. Naming two that overlap can take long, so that search is bounded.
    for first, second in _overlapping(pieces):
        return f"the pieces at {first.start} and {second.start} overlap"
    held, whole = sum(prod(p.shape) for p in pieces), prod(shape)
    return f"the pieces hold {held} of {whole} elements" if held != whole else "pieces overlap"


def _corners(rectangles: Iterable[tuple[tuple[int, ...], tuple[int, ...]]]) -> dict[tuple[int, ...], int]:
    """Add up the corners of rectangles (start, shape), each +1 or -1 by the number of its upper bounds; without zeros."""
    # In one dimension a piece is a step up where it starts and a step down where it ends, and the steps added up say how often
    # each place is covered. In n dimensions the 2^n corners do: they are the finite differences of the indicator function, and
    # sums of these give it back. So pieces cover a rectangle once, and nothing else, exactly when their corners are its own.
    total: Counter[tuple[int, ...]] = Counter()
    for start, shape in rectangles:
        for upper in product((0, 1), repeat=len(shape)):
            corner = tuple(a + n * u for a, n, u in zip(start, shape, upper, strict=True))
            total[corner] += (-1) ** sum(upper)
    return {corner: sign for corner, sign in total.items() if sign}


def _overlapping(pieces: Sequence[Part]) -> Iterator[tuple[Part, Part]]:
    """Yield pairs with an element in common, among those that a bounded search compares."""
    # A sweep along the first dimension: `live` are the pieces that reach as far as the current one begins.
    live: list[Part] = []
    left = MAX_COMPARISONS
    for piece in sorted(pieces, key=lambda p: p.start):
        if piece.start:
            live = [p for p in live if p.start[0] + p.shape[0] > piece.start[0]]
        left -= len(live)
        if left < 0:
            return
        for other in live:
            if overlap(0, other, piece) is not None:
                yield other, piece
        live.append(piece)


def assign_evenly(sizes: Sequence[int], holders: Sequence[Sequence[int]]) -> list[int]:
    """Choose one holder of each piece, so that bytes are spread evenly. The same input gives the same answer everywhere.

    sizes: bytes of each piece. holders: the ranks that hold each. Returns a rank for each piece.
    """
    # The heaviest piece first, to the least loaded of its holders (Graham's LPT rule for list scheduling). Pieces with the same
    # holders share one heap of (load, rank), so a thousand replicas cost a logarithm.
    load: dict[int, int] = {}
    queues: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    writers = [0] * len(sizes)
    for piece in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        ranks = tuple(holders[piece])
        if ranks not in queues:
            queues[ranks] = sorted((load.get(r, 0), r) for r in ranks)
        queue = queues[ranks]
        while queue[0][0] != load.get(queue[0][1], 0):  # the rank got work through another queue meanwhile
            rank = queue[0][1]
            heapq.heapreplace(queue, (load.get(rank, 0), rank))
        rank = queue[0][1]
        load[rank] = load.get(rank, 0) + sizes[piece]
        heapq.heapreplace(queue, (load[rank], rank))
        writers[piece] = rank
    return writers
