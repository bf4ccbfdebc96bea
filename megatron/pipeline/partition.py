"""Split a model's layers into pipeline stages of nearly equal work. Pure.

A pipeline is as fast as its busiest rank. The ends of a model count too: in a small model with a large vocabulary the output
layer and the loss cost as much as several layers, so the stage that contains them should have fewer layers. All costs are in
the same unit, for example FLOPs or seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise


def split_by_cost(costs: Sequence[float], placement: Sequence[int], first: float = 0.0, last: float = 0.0) -> tuple[range, ...]:
    """Return the layers of each stage, in order: a contiguous range with at least one layer for each stage.

    For layers of equal cost the split is optimal: none gives the busiest rank less work. Otherwise the split is first computed
    for layers of the mean cost, and each stage ends where the cumulated actual cost is closest to that of the computed split.

    Args:
        costs: cost of each layer, in any unit.
        placement: stage -> the rank that owns it.
        first: work of the first stage besides its layers, in the same unit.
        last: work of the last stage besides its layers.

    Raises:
        ValueError: there are fewer layers than stages, or a layer costs nothing.
    """
    stages, layers = len(placement), len(costs)
    if not 1 <= stages <= layers:
        raise ValueError(f"{layers} layers cannot be cut into {stages} stages of at least one layer")
    if min(costs) <= 0 or min(first, last) < 0:
        raise ValueError("each layer must cost more than 0, and the ends of the model at least 0")
    mean = sum(costs) / layers
    shares = accumulate(count * mean for count in even_counts(layers, mean, placement, first, last))
    work = [0.0, *accumulate(costs)]
    cuts = [0]
    for stage, share in enumerate(shares, start=1):
        possible = range(cuts[-1] + 1, layers - (stages - stage) + 1)  # leaves a layer for this stage and each later one
        cuts.append(min(possible, key=lambda cut: abs(work[cut] - share)) if stage < stages else layers)
    return tuple(range(begin, end) for begin, end in pairwise(cuts))


def even_counts(layers: int, layer: float, placement: Sequence[int], first: float = 0.0, last: float = 0.0) -> list[int]:
    """Return the number of layers of each stage, for layers of equal cost.

    Each stage gets one layer. The others are assigned one by one to the rank with the least work, and on that rank to the stage
    with the least work; the earlier stage wins a tie.

    Args:
        layers: number of layers.
        layer: cost of one layer.
        placement: stage -> the rank that owns it.
        first: work of the first stage besides its layers.
        last: work of the last stage besides its layers.
    """
    stages = range(len(placement))
    ends = [(first if s == 0 else 0.0) + (last if s == stages[-1] else 0.0) for s in stages]
    rank_ends = {rank: sum(ends[s] for s in stages if placement[s] == rank) for rank in placement}
    counts = [1] * len(stages)
    rank_counts = {rank: list(placement).count(rank) for rank in placement}
    for _ in range(layers - len(stages)):
        # Products, not running sums, so that equal loads are exactly equal in floating point.
        rank_load = {rank: rank_ends[rank] + rank_counts[rank] * layer for rank in rank_ends}
        least = min(stages, key=lambda s: (rank_load[placement[s]], ends[s] + counts[s] * layer, s))
        counts[least] += 1
        rank_counts[placement[least]] += 1
    return counts


def ranges_from_counts(counts: Sequence[int]) -> tuple[range, ...]:
    """Return the layers of each stage, given their number in each stage, which may be 0."""
    ends = list(accumulate(counts))
    return tuple(range(end - count, end) for count, end in zip(counts, ends, strict=True))
