"""Load: from any layout into any layout, in place.

First every byte is compared with the manifest, each file by one of the ranks. Then each rank finds the saved pieces that
its own rectangles touch and reads those slices alone; no tensor data travels between ranks. Everything that can be known
to be wrong is found before the first value is changed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron.checkpoint.agreement import together
from megatron.checkpoint.layout import (
    STATE,
    CheckpointError,
    Manifest,
    Piece,
    TensorRecord,
    check_bytes,
    check_sizes,
    path_in,
    read_manifest,
    read_state,
)
from megatron.checkpoint.shards import Copy, assign, copies
from megatron.checkpoint.storage import TORCH_DTYPES
from megatron.files.regular import check_regular, error_reason
from megatron.launch.watchdog import Watchdog
from megatron.mesh.mesh import Axis, Mesh
from megatron.parallel.spec import Checkpointable, Part, Shard

SHOWN = 20


@dataclass(frozen=True)
class Loaded:
    """iteration: of the checkpoint. missing: asked for and not in it. unexpected: in it, and asked for by no rank."""

    iteration: int
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]


def verify_together(directory: Path, world: Axis, watch: Watchdog | None = None) -> None:
    """Compare every byte of a checkpoint with its manifest; each file is read by one rank, so they share the work. Collective.

    CheckpointError on all ranks, naming the file, when one of them finds a difference. watch: is told what this rank does.
    """
    ranks = range(world.size)

    def mine() -> None:
        manifest = read_manifest(directory)
        check_sizes(directory, manifest)
        names = sorted(manifest.files)
        readers = assign([manifest.files[name].bytes for name in names], [ranks] * len(names))
        own = [name for name, reader in zip(names, readers, strict=True) if reader == world.rank]
        # Said anew for every chunk: a large file is not one that hangs.
        tell = None if watch is None else partial(watch.doing, alone=True)
        check_bytes(directory, manifest, own, tell or (lambda what: None))

    together(world, mine, watch, f"comparing {directory} with its checksums")


def load(
    directory: Path,
    parts: Mapping[str, Checkpointable],
    mesh: Mesh | None = None,
    *,
    strict: bool = True,
    verified: bool = False,
) -> Loaded:
    """Fill `parts` from one checkpoint directory, as `find` gives it, and hand them their scalars.

    Parts of the checkpoint that are not asked for are left alone: {"model": ...} takes the weights only. Values are cast to
    the type of the tensor they go to.
    mesh: of the run, so that what one rank does not ask for another may, and all ranks fail together (collective); without
    one this process is the whole run. strict: missing or unexpected tensors are an error; else they are only reported, and
    missing ones keep their values. verified: `verify_together` has just been through it, so that it is not done again.
    CheckpointError says what does not fit, with the checkpoint's value and the requested one.
    """
    if mesh is None:
        mesh = Mesh.single()
    world = mesh.world
    manifest, jobs, missing = together(world, lambda: _prepare(directory, parts, strict))
    state = together(world, lambda: _scalars(directory, parts, strict))
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
    if not verified:
        verify_together(directory, world)
    together(world, lambda: _fill(directory, jobs))
    together(world, lambda: _load_scalars(directory, parts, state))
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
            with opened(path_in(directory, name)) as file:
                keys = set(file.keys())
                for job in listed:
                    if job.piece.key not in keys:
                        raise CheckpointError(f"{directory / name}: it has no {job.piece.key!r}, which the manifest lists")
                    job.target[job.copy.target].copy_(_read(directory / name, file, job))


def _scalars(directory: Path, parts: Mapping[str, Checkpointable], strict: bool) -> dict[str, dict[str, Any]]:
    state = read_state(directory)
    if lacking := [prefix for prefix in parts if strict and prefix not in state]:
        raise CheckpointError(f"{directory / STATE}: it has no {first(lacking)}")
    return state


def _load_scalars(directory: Path, parts: Mapping[str, Checkpointable], state: Mapping[str, Mapping[str, Any]]) -> None:
    for prefix, part in parts.items():
        try:
            if prefix in state:
                part.load_scalars(state[prefix])
        except KeyError as error:
            raise CheckpointError(f"{directory / STATE}: {prefix}: {error} is missing") from error
        except (TypeError, ValueError, AttributeError, OverflowError) as error:
            raise CheckpointError(f"{directory / STATE}: {prefix}: {error}") from error


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A safetensors file; whatever is wrong with it becomes a CheckpointError that names it."""
    try:
        check_regular(path)
        with safe_open(str(path), framework="pt") as file:
            yield file
    except (OSError, MemoryError, SafetensorError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file: {error_reason(error)}") from error


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
    """One whole tensor, put together from its pieces. CheckpointError as `load`, but the bytes are not compared."""
    record = manifest.tensors[name]
    whole = torch.empty(record.shape, dtype=TORCH_DTYPES[record.dtype])
    _fill(directory, _jobs(record, Part.whole(record.shape), whole))
    return whole
