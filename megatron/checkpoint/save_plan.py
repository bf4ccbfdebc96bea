"""Plan a checkpoint: decide which rank writes which piece, and collect the small files.

The first rank learns from descriptions which rank holds what and decides which one writes it: each rectangle once, the bytes
spread evenly over its holders. That does not change between the saves of a run, so it is decided once and kept while it fits.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch

from megatron.checkpoint.agreement import all_agree, gather_objects, run_on_all_ranks, scatter_objects
from megatron.checkpoint.layout import CONFIG, STATE, TOKENIZER, CheckpointError, Piece, TensorRecord
from megatron.checkpoint.shards import assign_evenly, coverage_error
from megatron.checkpoint.snapshot import Snapshot
from megatron.checkpoint.storage import DTYPES, TORCH_DTYPES, TensorEntry
from megatron.mesh.mesh import Axis
from megatron.parallel.spec import Checkpointable, Part, Shard

# The tokenizer's files by name, with `/`, or a function that gives them.
Assets = Callable[[], Mapping[str, bytes]] | Mapping[str, bytes] | None


@dataclass(frozen=True)
class SavePlan:
    """One rank's plan of a checkpoint that is ready to be written.

    entries: the tensors of this rank's file; none where it writes nothing. tensors, files: the manifest's table of tensors and
    the small files by their names, with `/`; on the first rank alone.
    """

    iteration: int
    entries: tuple[TensorEntry, ...]
    tensors: Mapping[str, TensorRecord] = field(default_factory=dict)
    files: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Bytes of all ranks' tensors and of the small files, on the first rank; no more than is written, and hardly less."""
        records = self.tensors.values()
        tensors = sum(prod(r.shape) * TORCH_DTYPES[r.dtype].itemsize for r in records)
        return tensors + sum(map(len, self.files.values()))


@dataclass(frozen=True)
class HeldPiece:
    """Description of one rectangle that a rank holds, as it is sent to the first rank."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    part: Part


@dataclass(frozen=True)
class GlobalPlan:
    """Decision of the first rank. tensors: the manifest's table. writes: of each rank, key in its file -> (name, part)."""

    tensors: dict[str, TensorRecord]
    writes: list[dict[str, tuple[str, Part]]]


class Planner:
    """Planner of a run's checkpoints, one after the other. Collective over `world`, from the first to the last.

    snapshot: keeps copies, so that training may go on while a plan is written; None: the plan refers to the live tensors.
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
            iteration: which the state is of.
            parts: what to save, by the prefix of its tensors' names; the same prefixes on all ranks.
            config: the run's merged configuration, JSON values.
            assets: the tokenizer's files; the first rank's are taken.

        Raises:
            CheckpointError: on all ranks, when one cannot give its state, or they contradict each other.
        """
        world = self._world
        local = run_on_all_ranks(world, lambda: local_shards(parts), what="listing the state")
        held = [HeldPiece(name, s.dtype, s.shape, part) for (name, part), s in local.items()]
        # All ranks or none: a rank whose own pieces are as before must still take part where another's have changed.
        if not all_agree(world, held == self._held):
            self._plan(held)

        def collect() -> SavePlan:
            # `detach` is called when a tensor's turn comes to be written, and shares its memory: nothing is copied here.
            entries = [
                TensorEntry(key, local[at].dtype, at[1].shape, local[at].data.detach) for key, at in self._writes.items()
            ]
            if self._snapshot is not None:
                entries = self._snapshot.copy(entries)
            files = small_files(parts, config, assets) if world.first else {}
            return SavePlan(iteration, tuple(entries), self._tensors, files)

        return run_on_all_ranks(world, collect, what="copying the state")

    def _plan(self, held: list[HeldPiece]) -> None:
        world = self._world
        everyone = gather_objects(world, held)
        plan = run_on_all_ranks(world, lambda: make_global_plan(everyone) if everyone is not None else None, what="planning")
        self._writes = scatter_objects(world, plan.writes if plan else [])
        self._tensors = plan.tensors if plan else {}
        self._held = held


def shard_name(rank: int) -> str:
    """Return the name of the file that a rank writes its tensors into."""
    return f"shard_{rank:05d}.safetensors"


def local_shards(parts: Mapping[str, Checkpointable]) -> dict[tuple[str, Part], Shard]:
    """Return this rank's rectangles by name and part, each once, without the empty ones.

    CheckpointError for data of another shape than its part, and for a dtype that safetensors does not have.
    """
    found: dict[tuple[str, Part], Shard] = {}
    for prefix, part in parts.items():
        for shard in part.shards():
            name = f"{prefix}.{shard.name}"
            if tuple(shard.data.shape) != shard.part.shape:
                raise CheckpointError(f"{name}: the data is {tuple(shard.data.shape)}, its part says {shard.part.shape}")
            if shard.dtype not in DTYPES:
                raise CheckpointError(f"{name}: {shard.dtype} cannot be saved")
            if not shard.part.empty:
                found.setdefault((name, shard.part), shard)
    return found


def make_global_plan(held: Sequence[Sequence[HeldPiece]]) -> GlobalPlan:
    """Decide what every rank writes: each rectangle once, the bytes spread evenly over its holders.

    Args:
        held: of each rank, what it holds.

    Raises:
        CheckpointError: ranks contradict each other, or do not hold the whole of a tensor between them.
    """
    holders: dict[tuple[str, Part], list[int]] = {}
    known: dict[str, HeldPiece] = {}
    for rank, items in enumerate(held):
        for item in items:
            first = known.setdefault(item.name, item)
            if (first.shape, first.dtype) != (item.shape, item.dtype):
                raise CheckpointError(
                    f"{item.name}: {item.shape} {item.dtype} on rank {rank}, {first.shape} {first.dtype} on another rank"
                )
            holders.setdefault((item.name, item.part), []).append(rank)
    # In one order, so that the same ranks always write the same pieces, whatever order they listed them in.
    pieces = sorted(holders, key=lambda piece: (piece[0], piece[1].start, piece[1].shape))
    sizes = [known[name].dtype.itemsize * prod(part.shape) for name, part in pieces]
    writers = assign_evenly(sizes, [holders[piece] for piece in pieces])
    found: dict[str, list[Piece]] = {name: [] for name in known}
    writes: list[dict[str, tuple[str, Part]]] = [{} for _ in held]
    for (name, part), writer in zip(pieces, writers, strict=True):
        # A tensor in one piece keeps its plain name, by which other programs find it in the file; a cut one adds its start.
        whole = part == Part.whole(known[name].shape)
        key = name if whole else f"{name}@{','.join(map(str, part.start))}"
        found[name].append(Piece(shard_name(writer), key, part))
        writes[writer][key] = (name, part)
    for name, listed in found.items():
        if why := coverage_error(known[name].shape, [p.part for p in listed]):
            raise CheckpointError(f"{name}: the ranks do not hold it as disjoint pieces of one whole: {why}")
    return GlobalPlan({n: TensorRecord(DTYPES[known[n].dtype], known[n].shape, tuple(found[n])) for n in known}, writes)


def small_files(parts: Mapping[str, Checkpointable], config: Mapping[str, Any], assets: Assets) -> dict[str, bytes]:
    """Return the contents of the small files by name, with `/`: configuration, scalars, the tokenizer's files.

    Args:
        parts: what is saved; gives the scalars.
        config: the run's merged configuration, JSON values.
        assets: the tokenizer's files.
    """
    # Bytes, not objects: what happens to the state later, while a thread writes, changes nothing.
    files = {CONFIG: _json(config), STATE: _json({name: part.scalars() for name, part in parts.items()})}
    return files | {f"{TOKENIZER}/{name}": content for name, content in read_assets(assets).items()}


def _json(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=1, allow_nan=False) + "\n").encode()


def read_assets(assets: Assets) -> dict[str, bytes]:
    """Return the contents of the tokenizer's files by name, with `/`."""
    return dict((assets() if callable(assets) else assets) or {})
