"""Open the process groups of one rank, along each axis of the grid. The mesh is passed as an argument, never looked up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron.launch.device import describe_ranks
from megatron.launch.errors import JobError
from megatron.launch.watchdog import Watchdog
from megatron.mesh.grid import MESH_AXES, Grid


@dataclass(frozen=True)
class Axis:
    """One rank's position in one group of ranks.

    Attributes:
        name: name of the axis: `tp`, `dp_cp`.
        size: number of ranks in the group.
        rank: this rank's number within the group.
        ranks: global ranks of the group, in its order.
        group: the process group; None when the group is this rank alone.
    """

    name: str
    size: int
    rank: int
    ranks: tuple[int, ...]
    group: dist.ProcessGroup | None = field(default=None, repr=False, compare=False)

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
    """The parallel axes of one rank: all that parallel code may know about the layout."""

    grid: Grid
    rank: int
    tp: Axis  # tensor parallelism
    cp: Axis  # context parallelism: one sequence on several ranks
    dp: Axis  # data parallelism
    pp: Axis  # pipeline parallelism: stages, towards higher ranks
    dp_cp: Axis  # gradients of a parameter are summed here, unless its spec names another axis
    world: Axis  # all ranks
    pp_back: Axis  # pp again, with separate communicators for tensors that are sent to lower ranks
    embedding: Axis  # the ranks of a pipeline with the first and the last stage: copies of a tied matrix

    @classmethod
    def build(
        cls,
        grid: Grid,
        rank: int,
        timeout: timedelta | None = None,
        ends: tuple[int, int] = (0, -1),
        watch: Watchdog | None = None,
    ) -> Mesh:
        """Open the process groups of this rank's axes. Collective: every rank calls this.

        Args:
            grid: sizes of the axes.
            rank: this rank.
            timeout: the timeout of a collective; default torch's.
            ends: the pipeline ranks that own the first and the last stage.
            watch: the watchdog, to which the group that is being opened is reported.

        Raises:
            ValueError: the running job has another number of ranks than the grid.
            JobError: a group does not open; the message names it.
        """
        watch = watch or Watchdog()
        if dist.is_initialized() and dist.get_world_size() != grid.world_size:
            raise ValueError(f"layout {grid} needs {grid.world_size} ranks, the job has {dist.get_world_size()}")
        known: dict[tuple[int, ...], dist.ProcessGroup | None] = {}  # equal groups share one communicator
        opening: dict[tuple[int, ...], str] = {}
        axes: dict[str, Axis] = {}

        def add(name: str, ranks: tuple[int, ...], groups: dict[tuple[int, ...], dist.ProcessGroup | None]) -> None:
            if ranks not in groups:
                with naming_communicator(name, ranks, rank):
                    groups[ranks] = dist.new_group(list(ranks), timeout=timeout) if len(ranks) > 1 else None
                # Transfers along the pipeline have a communicator for each pair of ranks, which `pipeline.transfer` opens.
                if rank in ranks and len(ranks) > 1 and name != "pp_back":
                    opening[ranks] = name
            if rank in ranks:
                axes[name] = Axis(name, len(ranks), ranks.index(rank), ranks, groups[ranks])

        # new_group is collective over the world: each rank creates all groups in one order, even those that it is not in.
        for name, along in MESH_AXES.items():
            for members in grid.groups(*along):
                add(name, tuple(members), known)
        for members in grid.groups("pp"):
            add("pp_back", tuple(members), {})
            if rank in members:
                axes["embedding"] = Axis.alone("embedding", rank)
            add("embedding", tuple(sorted({members[end] for end in ends})), known)
        # In the same order on all ranks: two ranks that opened groups in different orders would wait for each other for ever.
        for ranks, name in opening.items():
            watch.doing(f"opening the communicator {name} of {describe_ranks(ranks)}")
            with naming_communicator(name, ranks, rank):
                _open(known[ranks])
        watch.idle()
        return cls(grid, rank, **axes)

    @classmethod
    def single(cls) -> Mesh:
        """Return the mesh of one process: every axis has size 1, and no process group exists."""
        return cls.build(Grid(), 0)

    def axis(self, name: str) -> Axis:
        """Return the axis that a parameter's spec names; ValueError when the mesh has none of that name."""
        axes = {own: axis for own, axis in vars(self).items() if isinstance(axis, Axis)}
        if name not in axes:
            raise ValueError(f"the mesh has no axis {name}; it has {', '.join(axes)}")
        return axes[name]


@contextmanager
def naming_communicator(name: str, ranks: Sequence[int], rank: int) -> Iterator[None]:
    """Turn a failure inside the block into a JobError that names the communicator.

    Args:
        name: name of the axis.
        ranks: global ranks of the group.
        rank: this rank.
    """
    try:
        yield
    except RuntimeError as error:
        why = " ".join(str(error).split())[:300]
        raise JobError(f"rank {rank} cannot open the communicator {name} of {describe_ranks(ranks)}: {why}") from error


def _open(group: dist.ProcessGroup | None) -> None:
    """Run a small collective, since NCCL sets a communicator up at its first use, and waits for the whole device then.

    In the middle of a step that could be a deadlock, if the device is waiting for a rank that waits here.
    """
    on_gpu = dist.get_backend(group) == "nccl"
    token = torch.ones(1, device=torch.device("cuda", torch.cuda.current_device()) if on_gpu else "cpu")  # [1]
    dist.all_reduce(token, group=group)
    token.item()  # waits for the device
