"""Saved rectangles, wanted rectangles, and what to copy between them. Pure: numbers in, numbers out.

A tensor lies in a checkpoint as disjoint rectangles ("pieces") that together are the whole. A rank that loads wants one
rectangle of its own, cut for another layout. Everything about going from any layout to any other is here.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron.parallel.spec import Part

Slices = tuple[slice, ...]


@dataclass(frozen=True)
class Copy:
    """`target` of the wanted rectangle is `source` of saved piece number `piece`; both relative to their own start."""

    piece: int
    source: Slices
    target: Slices

    @property
    def elements(self) -> int:
        return prod(s.stop - s.start for s in self.target)


def overlap(piece: int, saved: Part, wanted: Part) -> Copy | None:
    """What saved piece number `piece` holds of `wanted`; None when they have no element in common."""
    source, target = [], []
    for a, n, b, m in zip(saved.start, saved.shape, wanted.start, wanted.shape, strict=True):
        low, high = max(a, b), min(a + n, b + m)
        if low >= high:
            return None
        source.append(slice(low - a, high - a))
        target.append(slice(low - b, high - b))
    return Copy(piece, tuple(source), tuple(target))


def copies(wanted: Part, saved: Sequence[Part]) -> list[Copy]:
    """The copies that fill `wanted` from pieces that tile the whole tensor (see `fault`).

    ValueError when the pieces leave some of it open.
    """
    found = [c for c in (overlap(i, piece, wanted) for i, piece in enumerate(saved)) if c is not None]
    if sum(c.elements for c in found) != prod(wanted.shape):
        raise ValueError(f"the pieces do not cover {wanted.shape} at {wanted.start}")
    return found


def fault(shape: tuple[int, ...], pieces: Sequence[Part]) -> str | None:
    """Why `pieces` are no disjoint cover of a tensor of `shape`; None when they are one."""
    for piece in pieces:
        if len(piece.start) != len(shape) or len(piece.shape) != len(shape):
            return f"a piece of {len(piece.shape)} dimensions in a tensor of {len(shape)}"
        if any(a < 0 or n < 1 or a + n > whole for a, n, whole in zip(piece.start, piece.shape, shape, strict=True)):
            return f"the piece {piece.shape} at {piece.start} lies outside {shape}"
    for first, second in _overlapping(pieces):
        return f"the pieces at {first.start} and {second.start} overlap"
    held, whole = sum(prod(p.shape) for p in pieces), prod(shape)
    if held != whole:
        return f"the pieces hold {held} of {whole} elements"
    return None


def _overlapping(pieces: Sequence[Part]) -> Iterator[tuple[Part, Part]]:
    """Pairs with an element in common. A sweep along the first dimension, so that a thousand row slices stay cheap."""
    live: list[Part] = []
    for piece in sorted(pieces, key=lambda p: p.start):
        if piece.start:
            live = [p for p in live if p.start[0] + p.shape[0] > piece.start[0]]
        for other in live:
            if overlap(0, other, piece) is not None:
                yield other, piece
        live.append(piece)


def assign(sizes: Sequence[int], holders: Sequence[Sequence[int]]) -> list[int]:
    """Which holder writes each piece, so that the bytes are spread evenly: the heaviest first, to the least loaded.

    sizes: bytes of each piece. holders: the ranks that hold each. Returns one of the holders for each piece. The same
    input gives the same answer everywhere. Pieces with the same holders share one heap, so a thousand replicas cost a
    logarithm.
    """
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
