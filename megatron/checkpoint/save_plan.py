"""Plan a checkpoint: decide which rank writes which piece, and collect the small files.

Every rank describes its pieces to the first rank, which decides who writes each of them: each piece once, and the bytes spread
evenly over the ranks that have it. The decision is reused by later saves as long as the pieces stay the same.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch

from megatron.checkpoint.agreement import gather_objects, run_on_all_ranks, scatter_objects, true_on_all_ranks
from megatron.checkpoint.layout import CONFIG, STATE, TOKENIZER, CheckpointError, Piece, TensorRecord
from megatron.checkpoint.shards import assign_evenly, coverage_error
from megatron.checkpoint.snapshot import Snapshot
from megatron.checkpoint.storage import CODE_FROM_DTYPE, DTYPE_FROM_CODE, TensorEntry
from megatron.mesh.mesh import Axis
from megatron.parallel.spec import Checkpointable, Part, Shard

# The tokenizer's files by relative path, or a function that returns them.
Assets = Callable[[], Mapping[str, bytes]] | Mapping[str, bytes] | None


@dataclass(frozen=True)
class SavePlan:
    """One rank's plan of a checkpoint that is ready to be written.

    entries: tensors of this rank's file; empty if it writes none. tensors: the manifest's table of tensors. files: the small
    files by relative path. The tables are filled on the first rank only.
    """

    iteration: int
    entries: tuple[TensorEntry, ...]
    tensors: Mapping[str, TensorRecord] = field(default_factory=dict)
    files: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Lower bound of the checkpoint's bytes: all ranks' tensors and the small files. Valid on the first rank only."""
        records = self.tensors.values()
        tensors = sum(prod(r.shape) * DTYPE_FROM_CODE[r.dtype].itemsize for r in records)
        return tensors + sum(map(len, self.files.values()))


@dataclass(frozen=True)
class HeldPiece:
    """Description of one piece in a rank's memory, sent to the first rank. shape: of the whole tensor."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    part: Part


@dataclass(frozen=True)
class GlobalPlan:
    """Decision of the first rank. tensors: the manifest's table. writes: for each rank, key in its file -> (name, part)."""

    tensors: dict[str, TensorRecord]
    writes: list[dict[str, tuple[str, Part]]]


class Planner:
    """Planner of all checkpoints of a run. Every call is collective over `world`.

    snapshot: copies the tensors, so that training can continue while a plan is written; None: the plan refers to the live
    tensors.
    """

    def __init__(self, world: Axis, snapshot: Snapshot | None = None) -> None:
        self._world, self._snapshot = world, snapshot
        self._held: list[HeldPiece] | None = None
        self._tensors: dict[str, TensorRecord] = {}
        self._writes: dict[str, tuple[str, Part]] = {}

    def plan(
        self, iteration: int, parts: Mapping[str, Checkpointable], config: Mapping[str, Any], assets: Assets = None
    ) -> SavePlan:
        """Plan a checkpoint of the state as it is now. Collective.

        Args:
            iteration: number of training iterations that the state has completed.
            parts: the parts to save, by the prefix of their tensors' names; the same prefixes on all ranks.
            config: the run's merged configuration, as JSON values.
            assets: the tokenizer's files; only the first rank's are used.

        Raises:
            CheckpointError: on all ranks, when the state of one cannot be saved, or the ranks contradict each other.
        """
        world = self._world
        local = run_on_all_ranks(world, lambda: local_shards(parts), what="listing the state")
        held = [HeldPiece(name, s.dtype, s.shape, part) for (name, part), s in local.items()]
        # If the pieces of any rank have changed, all ranks must take part in the new plan.
        if not true_on_all_ranks(world, held == self._held):
            self._update_global_plan(held)

        def collect() -> SavePlan:
            # `detach` is passed as a function and shares the tensor's memory: nothing is copied here.
            entries = [
                TensorEntry(key, local[at].dtype, at[1].shape, local[at].data.detach) for key, at in self._writes.items()
            ]
            if self._snapshot is not None:
                entries = self._snapshot.copy(entries)
            files = small_files(parts, config, assets) if world.first else {}
            return SavePlan(iteration, tuple(entries), self._tensors, files)

        return run_on_all_ranks(world, collect, what="copying the state")

    def _update_global_plan(self, held: list[HeldPiece]) -> None:
        world = self._world
        by_rank = gather_objects(world, held)
        plan = run_on_all_ranks(world, lambda: make_global_plan(by_rank) if by_rank is not None else None, what="planning")
        self._writes = scatter_objects(world, plan.writes if plan else [])
        self._tensors = plan.tensors if plan else {}
        self._held = held


def shard_name(rank: int) -> str:
    """Return the name of the file that a rank writes its tensors into."""
    return f"shard_{rank:05d}.safetensors"


def local_shards(parts: Mapping[str, Checkpointable]) -> dict[tuple[str, Part], Shard]:
    """Return this rank's shards by name and part, without duplicates and empty ones.

    CheckpointError for a shard whose data has another shape than its part, and for a dtype that safetensors does not have.
    """
    shards: dict[tuple[str, Part], Shard] = {}
    for prefix, part in parts.items():
        for shard in part.shards():
            name = f"{prefix}.{shard.name}"
            if tuple(shard.data.shape) != shard.part.shape:
                raise CheckpointError(f"{name}: the data is {tuple(shard.data.shape)}, its part says {shard.part.shape}")
            if shard.dtype not in CODE_FROM_DTYPE:
                raise CheckpointError(f"{name}: {shard.dtype} cannot be saved")
            if not shard.part.empty:
                shards.setdefault((name, shard.part), shard)
    return shards


def make_global_plan(held: Sequence[Sequence[HeldPiece]]) -> GlobalPlan:
    """Decide what every rank writes: each piece once, and the bytes spread evenly over the ranks that have it.

    Args:
        held: the pieces of each rank.

    Raises:
        CheckpointError: the ranks contradict each other, or their pieces are not a disjoint cover of a tensor.
    """
    holders: dict[tuple[str, Part], list[int]] = {}
    first_pieces: dict[str, HeldPiece] = {}
    for rank, items in enumerate(held):
        for item in items:
            first = first_pieces.setdefault(item.name, item)
            if (first.shape, first.dtype) != (item.shape, item.dtype):
                raise CheckpointError(
                    f"{item.name}: {item.shape} {item.dtype} on rank {rank}, {first.shape} {first.dtype} on another rank"
                )
            holders.setdefault((item.name, item.part), []).append(rank)
    # Sorted, so that the plan does not depend on the order in which ranks list their pieces.
    pieces = sorted(holders, key=lambda piece: (piece[0], piece[1].start, piece[1].shape))
    sizes = [first_pieces[name].dtype.itemsize * prod(part.shape) for name, part in pieces]
    writers = assign_evenly(sizes, [holders[piece] for piece in pieces])
    tensor_pieces: dict[str, list[Piece]] = {name: [] for name in first_pieces}
    writes: list[dict[str, tuple[str, Part]]] = [{} for _ in held]
    for (name, part), writer in zip(pieces, writers, strict=True):
        # A tensor saved in one piece has its plain name as key, so that other programs find it in the file.
        whole = part == Part.whole(first_pieces[name].shape)
        key = name if whole else f"{name}@{','.join(map(str, part.start))}"
        tensor_pieces[name].append(Piece(shard_name(writer), key, part))
        writes[writer][key] = (name, part)
    for name, listed in tensor_pieces.items():
        if why := coverage_error(first_pieces[name].shape, [p.part for p in listed]):
            raise CheckpointError(f"{name}: the ranks do not hold it as disjoint pieces of one whole: {why}")
    tensors = {
        name: TensorRecord(CODE_FROM_DTYPE[first.dtype], first.shape, tuple(tensor_pieces[name]))
        for name, first in first_pieces.items()
    }
    return GlobalPlan(tensors, writes)


def small_files(parts: Mapping[str, Checkpointable], config: Mapping[str, Any], assets: Assets) -> dict[str, bytes]:
    """Return the contents of the small files by relative path: configuration, scalars, the tokenizer's files.

    Args:
        parts: the saved parts, for their scalars.
        config: the run's merged configuration, as JSON values.
        assets: the tokenizer's files.
    """
    # Serialized now, so that training cannot change the values while a thread writes them.
    files = {CONFIG: _json(config), STATE: _json({name: part.scalars() for name, part in parts.items()})}
    return files | {f"{TOKENIZER}/{name}": content for name, content in read_assets(assets).items()}


def _json(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=1, allow_nan=False) + "\n").encode()


def read_assets(assets: Assets) -> dict[str, bytes]:
    """Return the contents of the tokenizer's files by relative path."""
    return dict((assets() if callable(assets) else assets) or {})
