"""One rank's view of the grid, with live process groups. Passed to whoever needs it, never looked up."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta

import torch.distributed as dist

from megatron.mesh.grid import Grid


@dataclass(frozen=True)
class Axis:
    """One rank's place in one group of ranks. `group` is None when the group is this rank alone."""

    name: str
    size: int
    rank: int
    ranks: tuple[int, ...]
    group: dist.ProcessGroup | None = field(default=None, repr=False, compare=False)

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def last(self) -> bool:
        return self.rank == self.size - 1

    @classmethod
    def alone(cls, name: str, rank: int = 0) -> Axis:
        """An axis of size 1: what a single process, a tool or a plain layer uses."""
        return cls(name, 1, 0, (rank,))


@dataclass(frozen=True)
class Mesh:
    """Everything parallel code may know about the layout."""

    grid: Grid
    rank: int
    tp: Axis
    cp: Axis
    dp: Axis
    pp: Axis
    dp_cp: Axis  # gradients of a parameter are summed here
    tp_pp: Axis  # norms over the whole model are summed here
    world: Axis
    pp_back: Axis  # pp again, with communicators of its own for what travels to lower ranks
    embedding: Axis  # the ranks of a pipeline with the first and the last stage: copies of a tied matrix

    @classmethod
    def build(cls, grid: Grid, rank: int, timeout: timedelta | None = None, last_stage: int = -1) -> Mesh:
        """Collective: every rank calls this, and creates every group in the same order.

        timeout: a collective that takes longer is a failure; default torch's own. last_stage: the pipeline rank that owns
        it; the first stage is on rank 0.

        ValueError when the running job has another number of ranks than the grid.
        """
        if dist.is_initialized() and dist.get_world_size() != grid.world_size:
            raise ValueError(f"layout {grid} needs {grid.world_size} ranks, the job has {dist.get_world_size()}")
        unions = {
            "tp": ("tp",),
            "cp": ("cp",),
            "dp": ("dp",),
            "pp": ("pp",),
            "dp_cp": ("dp", "cp"),
            "tp_pp": ("pp", "tp"),
            "world": ("pp", "dp", "cp", "tp"),
        }
        known: dict[tuple[int, ...], dist.ProcessGroup | None] = {}  # equal groups share one communicator
        axes: dict[str, Axis] = {}

        def add(name: str, ranks: tuple[int, ...], groups: dict[tuple[int, ...], dist.ProcessGroup | None]) -> None:
            if ranks not in groups:
                groups[ranks] = dist.new_group(list(ranks), timeout=timeout) if len(ranks) > 1 else None
            if rank in ranks:
                axes[name] = Axis(name, len(ranks), ranks.index(rank), ranks, groups[ranks])

        for name, along in unions.items():
            for members in grid.groups(*along):
                add(name, tuple(members), known)
        for members in grid.groups("pp"):
            add("pp_back", tuple(members), {})
            if rank in members:
                axes["embedding"] = Axis.alone("embedding", rank)
            add("embedding", tuple(dict.fromkeys((members[0], members[last_stage]))), known)
        return cls(grid, rank, **axes)

    @classmethod
    def single(cls) -> Mesh:
        """The mesh of one process: every axis has size 1, and no process group exists."""
        return cls.build(Grid(), 0)
