"""Map ranks to coordinates on the parallel axes and back, and group ranks along axes. Pure arithmetic, for any world size.

The order is Megatron-LM's, with tensor parallelism fastest: rank = ((pp * DP + dp) * CP + cp) * TP + tp, where DP, CP and TP
are the sizes of the axes. So the ranks that communicate most are neighbours on a node.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from math import prod
from types import MappingProxyType

from megatron.config.schema import LayoutConfig

AXES = ("pp", "dp", "cp", "tp")  # slowest to fastest

# Axes of a `Mesh` -> axes of the grid along which the ranks of one group differ.
MESH_AXES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "tp": ("tp",),
        "cp": ("cp",),
        "dp": ("dp",),
        "pp": ("pp",),
        "dp_cp": ("dp", "cp"),
        "world": ("pp", "dp", "cp", "tp"),
    }
)


def is_within_stage(axis: str) -> bool:
    """Return whether each group of an axis is within a pipeline stage, so that its ranks have the same list of parameters."""
    return "pp" not in MESH_AXES.get(axis, ("pp",))  # other axes of the mesh, such as `embedding`, connect stages


def complementary_axes(axis: str) -> frozenset[str]:
    """Return the axes of the grid, without pp, that are not part of `axis`; together with it they span a stage's ranks."""
    # Stages have different parameters, so no sum over the copies of a parameter includes the pipeline axis.
    return frozenset(AXES) - {"pp", *MESH_AXES[axis]}


@dataclass(frozen=True)
class Grid:
    """Sizes of the four parallel axes.

    Attributes:
        pp: pipeline-parallel size.
        dp: data-parallel size.
        cp: context-parallel size.
        tp: tensor-parallel size.
    """

    pp: int = 1
    dp: int = 1
    cp: int = 1
    tp: int = 1

    @classmethod
    def from_layout(cls, layout: LayoutConfig, world_size: int) -> Grid:
        """Return the grid of a layout; the data-parallel size is the remaining factor of the world size.

        Raises:
            ValueError: the product of the other sizes does not divide the world size.
        """
        tp, pp, cp = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size, layout.context_parallel_size
        if world_size % (tp * pp * cp):
            raise ValueError(f"{world_size} ranks are not divisible by tp {tp} x pp {pp} x cp {cp}")
        return cls(pp=pp, dp=world_size // (tp * pp * cp), cp=cp, tp=tp)

    @property
    def shape(self) -> tuple[int, ...]:
        """The sizes of all axes, in the order of `AXES`."""
        return tuple(getattr(self, axis) for axis in AXES)

    @property
    def world_size(self) -> int:
        """Number of ranks in the grid."""
        return prod(self.shape)

    def coordinate(self, rank: int) -> dict[str, int]:
        """Return the coordinates of a rank, by axis.

        Raises:
            ValueError: the rank is outside the grid.
        """
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank {rank} is outside the grid of {self.world_size} ranks")
        position = {}
        for axis, size in zip(reversed(AXES), reversed(self.shape), strict=True):  # fastest first
            rank, position[axis] = divmod(rank, size)
        return position

    def rank(self, **position: int) -> int:
        """Return the rank at these coordinates, by axis; an axis that is not given has coordinate 0."""
        rank = 0
        for axis, size in zip(AXES, self.shape, strict=True):
            rank = rank * size + position.get(axis, 0)
        return rank

    def groups(self, *axes: str) -> Iterator[list[int]]:
        """Yield every group of ranks that differ only along `axes`. The order is the same on all ranks."""
        fixed_axes = [axis for axis in AXES if axis not in axes]
        group_axes = [axis for axis in AXES if axis in axes]
        for fixed in self._coordinates(fixed_axes):
            yield [self.rank(**fixed, **varying) for varying in self._coordinates(group_axes)]

    def _coordinates(self, axes: list[str]) -> Iterator[dict[str, int]]:
        """Yield all combinations of coordinates on some axes."""
        for position in product(*(range(getattr(self, axis)) for axis in axes)):
            yield dict(zip(axes, position, strict=True))
