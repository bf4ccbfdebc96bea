"""Ranks, coordinates and groups, against Megatron-LM's documented example and the definition."""

from __future__ import annotations

import itertools

import pytest

from megatron.mesh.grid import Grid


def test_megatrons_sixteen_gpu_example():
    """Tensor 2, pipeline 4, data 2: the groups listed in the docstring of Megatron-LM's parallel_state."""
    grid = Grid(pp=4, dp=2, tp=2)
    assert list(grid.groups("tp")) == [[i, i + 1] for i in range(0, 16, 2)]
    assert list(grid.groups("dp")) == [[0, 2], [1, 3], [4, 6], [5, 7], [8, 10], [9, 11], [12, 14], [13, 15]]
    assert list(grid.groups("pp")) == [[0, 4, 8, 12], [1, 5, 9, 13], [2, 6, 10, 14], [3, 7, 11, 15]]


@pytest.mark.parametrize("shape", list(itertools.product([1, 2, 3], repeat=4)))
def test_rank_and_coordinate_are_inverse_and_groups_cover_all(shape):
    grid = Grid(*shape)
    for rank in range(grid.world_size):
        assert grid.rank(**grid.coordinate(rank)) == rank
    for axes in (("tp",), ("dp", "cp"), ("pp", "tp"), ("pp", "dp", "cp", "tp")):
        assert sorted(itertools.chain(*grid.groups(*axes))) == list(range(grid.world_size))


def test_a_rank_outside_is_refused():
    with pytest.raises(ValueError, match="rank 4 is outside the grid of 4 ranks"):
        Grid(dp=2, tp=2).coordinate(4)
