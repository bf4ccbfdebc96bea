"""Arithmetic of the rectangles in which tensors are saved: which slices to copy, and which rank writes which piece.

A checkpoint stores a tensor as disjoint rectangles ("pieces") that together cover it. A loading rank needs one rectangle of
its own, which another parallel layout may cut differently. The functions here have no side effects.
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
MAX_COMPARISONS = 1_000_000  # pairs of pieces compared to find an overlap for an error message


@dataclass(frozen=True)
class Copy:
    """Copy from saved piece number `piece` to a wanted rectangle.

    source, target: slices of the piece and of the wanted rectangle, each relative to its own start.
    """

    piece: int
    source: Slices
    target: Slices

    @property
    def elements(self) -> int:
        """Number of elements that are copied."""
        return prod(s.stop - s.start for s in self.target)


def overlap(piece: int, saved: Part, wanted: Part) -> Copy | None:
    """Return the copy of the elements that a saved piece shares with a wanted rectangle; None if they share none.

    Args:
        piece: number of the saved piece.
        saved: the piece's rectangle of the whole tensor.
        wanted: the wanted rectangle of the same tensor.
    """
    source, target = [], []
    # Rectangles overlap if their intervals [a, a + n) and [b, b + m) overlap in every dimension; scalars always do.
    for a, n, b, m in zip(saved.start, saved.shape, wanted.start, wanted.shape, strict=True):
        low, high = max(a, b), min(a + n, b + m)
        if low >= high:
            return None
        source.append(slice(low - a, high - a))
        target.append(slice(low - b, high - b))
    return Copy(piece, tuple(source), tuple(target))


def find_copies(wanted: Part, saved: Sequence[Part]) -> list[Copy]:
    """Return the copies that fill `wanted` from pieces that tile the whole tensor (see `coverage_error`).

    ValueError when the pieces do not cover all of it.
    """
    # Since pieces are disjoint, no element is copied twice, and comparing the number of elements is enough.
    copies = [c for c in (overlap(i, piece, wanted) for i, piece in enumerate(saved)) if c is not None]
    if sum(c.elements for c in copies) != prod(wanted.shape):
        raise ValueError(f"the pieces do not cover {wanted.shape} at {wanted.start}")
    return copies


def coverage_error(shape: tuple[int, ...], pieces: Sequence[Part]) -> str | None:
    """Return why `pieces` are not a disjoint cover of a tensor of `shape`; None if they are one.

    The time is linear in the number of pieces, even if the list comes from a hostile file.
    """
    for piece in pieces:
        if len(piece.start) != len(shape) or len(piece.shape) != len(shape):
            return f"a piece of {len(piece.shape)} dimensions in a tensor of {len(shape)}"
        if any(a < 0 or n < 1 or a + n > whole for a, n, whole in zip(piece.start, piece.shape, shape, strict=True)):
            return f"the piece {piece.shape} at {piece.start} lies outside {shape}"
    if _corners((p.start, p.shape) for p in pieces) == _corners([((0,) * len(shape), shape)]):
        return None
    # The cover is wrong; the rest only finds a precise message. The search for an overlap could be slow, so it is bounded.
    for first, second in _overlapping_pairs(pieces):
        return f"the pieces at {first.start} and {second.start} overlap"
    covered, total = sum(prod(p.shape) for p in pieces), prod(shape)
    return f"the pieces hold {covered} of {total} elements" if covered != total else "pieces overlap"


def _corners(rectangles: Iterable[tuple[tuple[int, ...], tuple[int, ...]]]) -> dict[tuple[int, ...], int]:
    """Return the sum of the signs of rectangles (start, shape) at each corner, where it is not zero.

    A corner's sign is +1 or -1, for an even or odd number of coordinates at the upper bound.
    """
    # In one dimension a piece is +1 at its start and -1 at its end, and the running sum is how often each element is covered.
    # In n dimensions the signs at the 2^n corners are the finite differences of the indicator function, which their running
    # sums restore. So pieces cover a rectangle exactly once, and nothing else, if and only if their signs sum to its own.
    total: Counter[tuple[int, ...]] = Counter()
    for start, shape in rectangles:
        for upper in product((0, 1), repeat=len(shape)):
            corner = tuple(a + n * u for a, n, u in zip(start, shape, upper, strict=True))
            total[corner] += (-1) ** sum(upper)
    return {corner: sign for corner, sign in total.items() if sign}


def _overlapping_pairs(pieces: Sequence[Part]) -> Iterator[tuple[Part, Part]]:
    """Yield overlapping pairs of pieces, until MAX_COMPARISONS pairs have been compared."""
    # A sweep along the first dimension: `active` are the earlier pieces that end after the start of the current one.
    active: list[Part] = []
    comparisons_left = MAX_COMPARISONS
    for piece in sorted(pieces, key=lambda p: p.start):
        if piece.start:
            active = [p for p in active if p.start[0] + p.shape[0] > piece.start[0]]
        comparisons_left -= len(active)
        if comparisons_left < 0:
            return
        for other in active:
            if overlap(0, other, piece) is not None:
                yield other, piece
        active.append(piece)


def assign_evenly(sizes: Sequence[int], holders: Sequence[Sequence[int]]) -> list[int]:
    """Assign each piece to one of its holders, so that bytes are spread evenly. Deterministic, so that all ranks agree.

    sizes: bytes of each piece. holders: ranks that could take each piece. Returns the chosen rank for each piece.
    """
    # The largest piece first, to the least loaded of its holders (Graham's LPT rule for list scheduling). Pieces with the same
    # holders share a heap of (load, rank), so that an assignment takes logarithmic time in the number of holders.
    load: dict[int, int] = {}
    queues: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    chosen = [0] * len(sizes)
    for piece in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        ranks = tuple(holders[piece])
        if ranks not in queues:
            queues[ranks] = sorted((load.get(r, 0), r) for r in ranks)
        queue = queues[ranks]
        while queue[0][0] != load.get(queue[0][1], 0):  # outdated: the rank was assigned a piece through another queue
            rank = queue[0][1]
            heapq.heapreplace(queue, (load.get(rank, 0), rank))
        rank = queue[0][1]
        load[rank] = load.get(rank, 0) + sizes[piece]
        heapq.heapreplace(queue, (load[rank], rank))
        chosen[piece] = rank
    return chosen
