"""What goes into a checkpoint: who writes which piece, and the small files.

The first rank learns from descriptions who holds what and decides who writes what: each rectangle once, the bytes spread
evenly over its holders. That does not change between the saves of a run, so it is decided once and kept while it fits.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch

from megatron.checkpoint.agreement import all_say, gather, scatter, together
from megatron.checkpoint.layout import CONFIG, STATE, TOKENIZER, CheckpointError, Piece, TensorRecord
from megatron.checkpoint.shards import assign, fault
from megatron.checkpoint.snapshot import Snapshot
from megatron.checkpoint.storage import DTYPES, TORCH_DTYPES, Entry
from megatron.mesh.mesh import Axis
from megatron.parallel.spec import Checkpointable, Part, Shard

# The tokenizer's files by name, with `/`, or a function that gives them.
Assets = Callable[[], Mapping[str, bytes]] | Mapping[str, bytes] | None


@dataclass(frozen=True)
class Content:
    """One checkpoint, ready to be written.

    entries: the tensors of this rank's file; none where it writes nothing. tensors, files: the first rank's alone: the
    manifest's table of tensors, and the small files by their names, with `/`.
    """

    iteration: int
    entries: tuple[Entry, ...]
    tensors: Mapping[str, TensorRecord] = field(default_factory=dict)
    files: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Of all ranks' tensors and of the small files, on the first rank; no more than is written, and hardly less."""
        records = self.tensors.values()
        tensors = sum(prod(r.shape) * TORCH_DTYPES[r.dtype].itemsize for r in records)
        return tensors + sum(map(len, self.files.values()))


@dataclass(frozen=True)
class Held:
    """What a rank tells about one rectangle that it holds."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    part: Part


@dataclass(frozen=True)
class Plan:
    """The first rank's decision. tensors: the manifest's. writes: per rank, key -> (name, part) in its file."""

    tensors: dict[str, TensorRecord]
    writes: list[dict[str, tuple[str, Part]]]


class Contents:
    """Makes the content of one checkpoint of a run after another. Collective over `world`, from the first to the last.

    snapshot: keeps copies, so that training may go on while the content is written; None: it refers to the live tensors.
    """

    def __init__(self, world: Axis, snapshot: Snapshot | None = None) -> None:
        self._world, self._snapshot = world, snapshot
        self._held: list[Held] | None = None
        self._tensors: dict[str, TensorRecord] = {}
        self._writes: dict[str, tuple[str, Part]] = {}

    def take(
        self, iteration: int, parts: Mapping[str, Checkpointable], config: Mapping[str, Any], assets: Assets = None
    ) -> Content:
        """The state as it is now. CheckpointError on all ranks when one cannot give its own, or they contradict each other."""
        world = self._world
        local = together(world, lambda: local_shards(parts), what="listing the state")
        held = [Held(name, s.dtype, s.shape, part) for (name, part), s in local.items()]
        if not all_say(world, held == self._held):
            self._plan(held)

        def content() -> Content:
            entries = [Entry(key, local[at].dtype, at[1].shape, local[at].data.detach) for key, at in self._writes.items()]
            if self._snapshot is not None:
                entries = self._snapshot.take(entries)
            files = small_files(parts, config, assets) if world.first else {}
            return Content(iteration, tuple(entries), self._tensors, files)

        return together(world, content, what="copying the state")

    def _plan(self, held: list[Held]) -> None:
        world = self._world
        everyone = gather(world, held)
        plan = together(world, lambda: make_plan(everyone) if everyone is not None else None, what="planning")
        self._writes = scatter(world, plan.writes if plan else [])
        self._tensors = plan.tensors if plan else {}
        self._held = held


def shard_name(rank: int) -> str:
    """Return the name of the file that a rank writes its tensors into."""
    return f"shard_{rank:05d}.safetensors"


def local_shards(parts: Mapping[str, Checkpointable]) -> dict[tuple[str, Part], Shard]:
    """This rank's rectangles under their full names, each once, without the empty ones."""
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


def make_plan(held: Sequence[Sequence[Held]]) -> Plan:
    """From what every rank holds to what every rank writes: each rectangle once, the bytes spread evenly over its holders.

    CheckpointError when ranks contradict each other, or when together they do not hold the whole of a tensor.
    """
    holders: dict[tuple[str, Part], list[int]] = {}
    known: dict[str, Held] = {}
    for rank, items in enumerate(held):
        for item in items:
            first = known.setdefault(item.name, item)
            if (first.shape, first.dtype) != (item.shape, item.dtype):
                raise CheckpointError(
                    f"{item.name}: {item.shape} {item.dtype} on rank {rank}, {first.shape} {first.dtype} on another rank"
                )
            holders.setdefault((item.name, item.part), []).append(rank)
    pieces = sorted(holders, key=lambda piece: (piece[0], piece[1].start, piece[1].shape))
    sizes = [known[name].dtype.itemsize * prod(part.shape) for name, part in pieces]
    writers = assign(sizes, [holders[piece] for piece in pieces])
    found: dict[str, list[Piece]] = {name: [] for name in known}
    writes: list[dict[str, tuple[str, Part]]] = [{} for _ in held]
    for (name, part), writer in zip(pieces, writers, strict=True):
        whole = part == Part.whole(known[name].shape)
        key = name if whole else f"{name}@{','.join(map(str, part.start))}"
        found[name].append(Piece(shard_name(writer), key, part))
        writes[writer][key] = (name, part)
    for name, listed in found.items():
        if why := fault(known[name].shape, [p.part for p in listed]):
            raise CheckpointError(f"{name}: the ranks do not hold it as disjoint pieces of one whole: {why}")
    return Plan({n: TensorRecord(DTYPES[known[n].dtype], known[n].shape, tuple(found[n])) for n in known}, writes)


def small_files(parts: Mapping[str, Checkpointable], config: Mapping[str, Any], assets: Assets) -> dict[str, bytes]:
    """The configuration, the scalars and the tokenizer's files, as bytes: what happens to the state later changes nothing."""
    files = {CONFIG: _json(config), STATE: _json({name: part.scalars() for name, part in parts.items()})}
    return files | {f"{TOKENIZER}/{name}": content for name, content in read_assets(assets).items()}


def _json(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=1, allow_nan=False) + "\n").encode()


def read_assets(assets: Assets) -> dict[str, bytes]:
    """The tokenizer's files by name, with `/`."""
    return dict((assets() if callable(assets) else assets) or {})
