"""Map ranks to coordinates on the parallel axes and back, and group ranks along axes. Pure arithmetic, for any world size.

The order is Megatron-LM's, with tensor parallelism fastest: rank = ((pp * DP + dp) * CP + cp) * TP + tp. So the ranks that
communicate most are neighbours on a node.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from math import prod
from types import MappingProxyType

from megatron.config.schema import LayoutConfig

AXES = ("pp", "dp", "cp", "tp")  # slowest to fastest

# The axes of a mesh, each with the axes of the grid along which its ranks differ.
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
    """Return whether all ranks of an axis share one pipeline stage, so that they hold the same list of parameters."""
    return "pp" not in MESH_AXES.get(axis, ("pp",))


def complementary_axes(axis: str) -> frozenset[str]:
    """Return the axes of the grid, without pp, that are not part of `axis`: together they span all ranks of a stage."""
    # Stages hold different parameters, so sums over the ranks of a stage never include the pipeline axis.
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
        """Return the grid of a layout; data parallelism takes the remaining factor of the world size.

        Raises:
            ValueError: the other sizes do not divide the world.
        """
        tp, pp, cp = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size, layout.context_parallel_size
        if world_size % (tp * pp * cp):
            raise ValueError(f"{world_size} ranks do not divide by tp {tp} x pp {pp} x cp {cp}")
        return cls(pp=pp, dp=world_size // (tp * pp * cp), cp=cp, tp=tp)

    @property
    def shape(self) -> tuple[int, ...]:
        """The sizes of all axes, in the order of `AXES`."""
        return tuple(getattr(self, axis) for axis in AXES)

    @property
    def world_size(self) -> int:
        """Number of ranks of the whole grid."""
        return prod(self.shape)

    def coordinate(self, rank: int) -> dict[str, int]:
        """Return the coordinate of a rank on each axis.

        Raises:
            ValueError: the rank is outside of the grid.
        """
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank {rank} is outside the grid of {self.world_size} ranks")
        position = {}
        for axis, size in zip(reversed(AXES), reversed(self.shape), strict=True):  # fastest first
            rank, position[axis] = divmod(rank, size)
        return position

    def rank(self, **position: int) -> int:
        """Return the rank at a coordinate; axes left out are at 0."""
        rank = 0
        for axis, size in zip(AXES, self.shape, strict=True):
            rank = rank * size + position.get(axis, 0)
        return rank

    def groups(self, *axes: str) -> Iterator[list[int]]:
        """Yield every group of ranks that differ only along `axes`, in one fixed order, the same on all ranks."""
        fixed = [a for a in AXES if a not in axes]
        moving = [a for a in AXES if a in axes]
        for here in product(*(range(getattr(self, a)) for a in fixed)):
            yield [
                self.rank(**dict(zip(fixed, here, strict=True)), **dict(zip(moving, there, strict=True)))
                for there in product(*(range(getattr(self, a)) for a in moving))
            ]
