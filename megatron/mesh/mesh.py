"""Open the process groups of one rank, along each axis of the grid. A mesh is passed as an argument; there is no global one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron.launch.device import describe_ranks
from megatron.launch.errors import JobError
from megatron.launch.watchdog import Watchdog
from megatron.mesh.grid import MESH_AXES, Grid
from megatron.mesh.shared_collectives import SharedGroup
from megatron.mesh.shared_opening import open_shared_groups


@dataclass(frozen=True)
class Axis:
    """One rank's group along an axis of the mesh, and its position there.

    Attributes:
        name: name of the axis, such as `tp` or `dp_cp`.
        size: number of ranks in the group.
        rank: number of this rank within the group.
        ranks: global ranks of the group, in its order.
        group: the process group; None if this rank is alone, or there is no job.
        shared: the same ranks in memory that they share; None if they are not on one host, or have GPUs.
    """

    name: str
    size: int
    rank: int
    ranks: tuple[int, ...]
    group: dist.ProcessGroup | None = field(default=None, repr=False, compare=False)
    shared: SharedGroup | None = field(default=None, repr=False, compare=False)

    @property
    def first(self) -> bool:
        """True on the first rank of the axis."""
        return self.rank == 0

    @property
    def last(self) -> bool:
        """True on the last rank of the axis."""
        return self.rank == self.size - 1

    @classmethod
    def alone(cls, name: str, rank: int = 0) -> Axis:
        """Return an axis of size 1, for a single process."""
        return cls(name, 1, 0, (rank,))


@dataclass(frozen=True)
class Mesh:
    """The parallel axes of one rank: the only description of the layout that parallel code uses."""

    grid: Grid
    rank: int
    tp: Axis  # tensor parallelism
    cp: Axis  # context parallelism: one sequence on several ranks
    dp: Axis  # data parallelism
    pp: Axis  # pipeline parallelism: stages, towards higher ranks
    dp_cp: Axis  # data and context parallelism: gradients are summed here, unless the parameter's spec names another axis
    world: Axis  # all ranks
    pp_back: Axis  # the ranks of pp, with separate communicators for tensors that are sent to lower ranks
    embedding: Axis  # the ranks of a pipeline with the first and the last stage, which have copies of a tied embedding

    @classmethod
    def build(
        cls,
        grid: Grid,
        rank: int,
        timeout: timedelta | None = None,
        ends: tuple[int, int] = (0, -1),
        watch: Watchdog | None = None,
        shared_memory: bool = True,
    ) -> Mesh:
        """Open the process groups of this rank's axes. Collective: every rank calls this.

        Args:
            grid: sizes of the axes.
            rank: this rank.
            timeout: the timeout of a collective; None for torch's default.
            ends: the pipeline ranks with the first and the last stage.
            watch: the watchdog, to which the phases are reported; None reports nothing.
            shared_memory: use shared memory between CPU ranks of one host, if the machine can.

        Raises:
            ValueError: the job has another number of ranks than the grid.
            JobError: a group cannot be opened; the message names it.
        """
        watch = watch or Watchdog()
        if dist.is_initialized() and dist.get_world_size() != grid.world_size:
            raise ValueError(f"layout {grid} needs {grid.world_size} ranks, but the job has {dist.get_world_size()}")
        shared: dict[tuple[int, ...], dist.ProcessGroup | None] = {}  # axes with the same ranks share one process group
        to_open: dict[tuple[int, ...], str] = {}  # ranks -> name of the groups whose communicators are opened below
        axes: dict[str, Axis] = {}

        def add_group(name: str, ranks: tuple[int, ...], groups: dict[tuple[int, ...], dist.ProcessGroup | None]) -> None:
            if ranks not in groups:
                with naming_communicator(name, ranks, rank):
                    groups[ranks] = dist.new_group(list(ranks), timeout=timeout) if len(ranks) > 1 else None
                # `pipeline.transfer` opens the communicators of pp_back, one for each pair of ranks.
                if rank in ranks and len(ranks) > 1 and name != "pp_back":
                    to_open[ranks] = name
            if rank in ranks:
                axes[name] = Axis(name, len(ranks), ranks.index(rank), ranks, groups[ranks])

        # new_group is collective over the world: all ranks create all groups in the same order, even those without them.
        for name, grid_axes in MESH_AXES.items():
            for members in grid.groups(*grid_axes):
                add_group(name, tuple(members), shared)
        for members in grid.groups("pp"):
            add_group("pp_back", tuple(members), {})
            if rank in members:
                axes["embedding"] = Axis.alone("embedding", rank)
            add_group("embedding", tuple(sorted({members[end] for end in ends})), shared)
        # The order is the same on all ranks: if two opened groups in different orders, they would wait for each other for ever.
        for ranks, name in to_open.items():
            watch.doing(f"opening the communicator {name} of {describe_ranks(ranks)}")
            with naming_communicator(name, ranks, rank):
                _open_communicator(shared[ranks])
        if shared_memory:
            watch.doing("opening the memory that ranks of one host share")
        in_memory = open_shared_groups(list(shared), rank, timeout) if shared_memory else {}
        watch.idle()
        return cls(grid, rank, **{name: replace(axis, shared=in_memory.get(axis.ranks)) for name, axis in axes.items()})

    @classmethod
    def single(cls) -> Mesh:
        """Return the mesh of a single process: every axis has size 1, without process groups."""
        return cls.build(Grid(), 0)

    def axis(self, name: str) -> Axis:
        """Return the axis of this name; ValueError if the mesh has none."""
        axes = {field_name: axis for field_name, axis in vars(self).items() if isinstance(axis, Axis)}
        if name not in axes:
            raise ValueError(f"the mesh has no axis {name}; it has {', '.join(axes)}")
        return axes[name]


@contextmanager
def naming_communicator(name: str, ranks: Sequence[int], rank: int) -> Iterator[None]:
    """Turn a RuntimeError inside the block into a JobError that names the communicator.

    Args:
        name: name of the axis whose group is being opened.
        ranks: global ranks of the group.
        rank: this rank.
    """
    try:
        yield
    except RuntimeError as error:
        why = " ".join(str(error).split())[:300]
        raise JobError(f"rank {rank} cannot open the communicator {name} of {describe_ranks(ranks)}: {why}") from error


def _open_communicator(group: dist.ProcessGroup | None) -> None:
    """Open a group's communicator by a small collective, since NCCL opens it at its first use.

    NCCL then waits for all work of the device. In the middle of a step this can be a deadlock, if that work waits for another
    rank, which waits in the same way.
    """
    on_gpu = dist.get_backend(group) == "nccl"
    token = torch.ones(1, device=torch.device("cuda", torch.cuda.current_device()) if on_gpu else "cpu")  # [1]
    dist.all_reduce(token, group=group)
    token.item()  # waits for the device
