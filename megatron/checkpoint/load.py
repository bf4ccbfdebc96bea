"""Load: from any layout into any layout, in place, reading only the bytes that are wanted.

Each rank finds the saved pieces that its own rectangles touch and reads those slices; no tensor data travels between
ranks. Everything that can be known to be wrong is found before the first value is changed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron.checkpoint.layout import (
    CheckpointError,
    Manifest,
    Piece,
    TensorRecord,
    check_sizes,
    read_manifest,
    read_state,
)
from megatron.checkpoint.save import together
from megatron.checkpoint.shards import Copy, copies
from megatron.checkpoint.storage import TORCH_DTYPES
from megatron.mesh.mesh import Mesh
from megatron.parallel.spec import Checkpointable, Part, Shard

SHOWN = 20


@dataclass(frozen=True)
class Loaded:
    """iteration: of the checkpoint. missing: asked for and not in it. unexpected: in it, and asked for by no rank."""

    iteration: int
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]


def load(directory: Path, parts: Mapping[str, Checkpointable], mesh: Mesh | None = None, *, strict: bool = True) -> Loaded:
    """Fill `parts` from one checkpoint directory, as `find` gives it, and hand them their scalars.

    Parts of the checkpoint that are not asked for are left alone: {"model": ...} takes the weights only. Values are cast to
    the type of the tensor they go to.
    mesh: of the run, so that what one rank does not ask for another may, and all ranks fail together (collective); without
    one this process is the whole run. strict: missing or unexpected tensors are an error; else they are only reported, and
    missing ones keep their values.
    CheckpointError says what does not fit, with the checkpoint's value and the requested one.
    """
    if mesh is None:
        mesh = Mesh.single()
    world = mesh.world
    manifest, jobs, missing = together(world, lambda: _prepare(directory, parts, strict))
    mine = sorted({f"{prefix}.{s.name}" for prefix, part in parts.items() for s in part.shards()})
    asked = [mine]
    if world.group is not None:
        asked = [[] for _ in range(world.size)]
        dist.all_gather_object(asked, mine, group=world.group)
    known = {name for names in asked for name in names}
    unexpected = tuple(n for n in manifest.tensors if n.split(".", 1)[0] in parts and n not in known)
    if strict and unexpected:
        hint = "the configuration of this run has no such tensors; compare it with the checkpoint's config.json"
        raise CheckpointError(f"{directory}: {len(unexpected)} unexpected tensors: {first(unexpected)}: {hint}")
    together(world, lambda: _fill(directory, jobs))
    together(world, lambda: _load_scalars(directory, parts, strict))
    return Loaded(manifest.iteration, missing, unexpected)


@dataclass(frozen=True)
class Job:
    """Slices of one piece, and the tensor that takes them. dtype: the safetensors code of what is saved."""

    piece: Piece
    dtype: str
    copy: Copy
    target: Tensor


def first(names: Iterable[str]) -> str:
    """The first names of many, for a message."""
    listed = list(names)
    return ", ".join(listed[:SHOWN]) + (", ..." if len(listed) > SHOWN else "")


def _prepare(directory: Path, parts: Mapping[str, Checkpointable], strict: bool) -> tuple[Manifest, list[Job], tuple[str, ...]]:
    manifest = read_manifest(directory)
    check_sizes(directory, manifest)
    jobs: list[Job] = []
    missing: list[str] = []
    wrong: list[str] = []
    for prefix, part in parts.items():
        for shard in part.shards():
            name = f"{prefix}.{shard.name}"
            record = manifest.tensors.get(name)
            if record is None:
                missing.append(name)
            elif why := _misfit(record, shard):
                wrong.append(f"{name}: {why}")
            elif not shard.part.empty:
                jobs += _jobs(record, shard.part, shard.data)
    if wrong:
        raise CheckpointError(f"{directory}: {len(wrong)} tensors do not fit: " + "; ".join(wrong[:SHOWN]))
    if missing and strict:
        raise CheckpointError(f"{directory}: {len(missing)} tensors are not in the checkpoint: {first(missing)}")
    return manifest, jobs, tuple(missing)


def _misfit(record: TensorRecord, shard: Shard) -> str | None:
    if record.shape != shard.shape:
        return f"the checkpoint has shape {list(record.shape)}, requested is {list(shard.shape)}"
    if TORCH_DTYPES[record.dtype].is_floating_point != shard.dtype.is_floating_point:
        return f"the checkpoint has {TORCH_DTYPES[record.dtype]}, requested is {shard.dtype}"
    return None


def _jobs(record: TensorRecord, wanted: Part, target: Tensor) -> list[Job]:
    found = copies(wanted, [p.part for p in record.pieces])
    return [Job(record.pieces[c.piece], record.dtype, c, target) for c in found]


def _fill(directory: Path, jobs: Iterable[Job]) -> None:
    by_file: dict[str, list[Job]] = defaultdict(list)
    for job in jobs:
        by_file[job.piece.file].append(job)
    with torch.no_grad():
        for name, listed in sorted(by_file.items()):
            with opened(directory / name) as file:
                keys = set(file.keys())
                for job in listed:
                    if job.piece.key not in keys:
                        raise CheckpointError(f"{directory / name}: it has no {job.piece.key!r}, which the manifest lists")
                    job.target[job.copy.target].copy_(_read(directory / name, file, job))


def _load_scalars(directory: Path, parts: Mapping[str, Checkpointable], strict: bool) -> None:
    state = read_state(directory)
    for prefix, part in parts.items():
        if prefix in state:
            part.load_scalars(state[prefix])
        elif strict:
            raise CheckpointError(f"{directory}: its state.json has no {prefix!r}")


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A safetensors file; whatever is wrong with it becomes a CheckpointError that names it."""
    try:
        with safe_open(str(path), framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file: {error}") from error


def _read(path: Path, file: Any, job: Job) -> Tensor:
    """The wanted slices of one piece. CheckpointError when the file's own header contradicts the manifest."""
    saved = file.get_slice(job.piece.key)
    shape, dtype = tuple(saved.get_shape()), saved.get_dtype()
    if (shape, dtype) != (job.piece.part.shape, job.dtype):
        listed = f"{job.piece.part.shape} {job.dtype}"
        raise CheckpointError(f"{path}: {job.piece.key!r} is {shape} {dtype}, the manifest says {listed}")
    tensor: Tensor = saved[job.copy.source] if shape else file.get_tensor(job.piece.key)
    return tensor


def read_tensor(directory: Path, manifest: Manifest, name: str) -> Tensor:
    """One whole tensor, put together from its pieces. CheckpointError as `load`."""
    record = manifest.tensors[name]
    whole = torch.empty(record.shape, dtype=TORCH_DTYPES[record.dtype])
    _fill(directory, _jobs(record, Part.whole(record.shape), whole))
    return whole
