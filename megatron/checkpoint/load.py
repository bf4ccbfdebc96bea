"""Load a checkpoint that was saved under any parallel layout into the tensors of any other, in place.

Each rank computes which slices of the saved pieces overlap its own rectangles. Then the ranks compare every byte with the
manifest, each file on one rank. Only after all checks does each rank read its slices; ranks exchange no tensor data.
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

from megatron.checkpoint.agreement import run_on_all_ranks
from megatron.checkpoint.layout import (
    STATE,
    CheckpointError,
    Manifest,
    Piece,
    TensorRecord,
    check_bytes,
    check_sizes,
    checked_path,
    read_manifest,
    read_state,
)
from megatron.checkpoint.shards import Copy, assign_evenly, find_copies
from megatron.checkpoint.storage import DTYPE_FROM_CODE
from megatron.files.regular import check_regular, error_reason
from megatron.launch.watchdog import Watchdog
from megatron.mesh.mesh import Axis, Mesh
from megatron.parallel.spec import Checkpointable, Part, Shard

MAX_NAMES_SHOWN = 20


@dataclass(frozen=True)
class LoadReport:
    """Report of a load.

    iteration: the checkpoint's iteration. missing: this rank's tensors that are not in the checkpoint. unexpected: the
    checkpoint's tensors, of the loaded parts, that no rank requested.
    """

    iteration: int
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]


def verify_on_all_ranks(directory: Path, world: Axis, watch: Watchdog | None = None) -> None:
    """Compare every byte of a checkpoint with its manifest; each file is read by one rank. Collective.

    Args:
        directory: the checkpoint's directory, on a file system that all ranks share.
        world: the ranks that share the work.
        watch: watchdog that is told what this rank is doing.

    Raises:
        CheckpointError: on all ranks, naming the file, when one of them finds a difference.
    """
    ranks = range(world.size)

    def check_own_files() -> None:
        manifest = read_manifest(directory)
        check_sizes(directory, manifest)
        names = sorted(manifest.files)
        readers = assign_evenly([manifest.files[name].bytes for name in names], [ranks] * len(names))
        own = [name for name, reader in zip(names, readers, strict=True) if reader == world.rank]
        # Reported after every chunk, so that the watchdog does not mistake a large file for a hang.
        report = None if watch is None else partial(watch.doing, alone=True)
        check_bytes(directory, manifest, own, report or (lambda progress: None))

    run_on_all_ranks(world, check_own_files, watch, f"comparing {directory} with its checksums")


def load(
    directory: Path,
    parts: Mapping[str, Checkpointable],
    mesh: Mesh | None = None,
    *,
    strict: bool = True,
    verified: bool = False,
) -> LoadReport:
    """Fill `parts` from one checkpoint directory, in place. Collective over the mesh.

    Args:
        directory: the checkpoint's directory, as `find_checkpoint` returns it.
        parts: the parts to fill, by the prefix of their tensors' names. Other parts of the checkpoint are ignored:
            {"model": ...} loads only the weights. Floating-point values are cast to the dtype of the receiving tensor.
        mesh: the run's mesh, over which the requested names are collected; None: this process is the whole run.
        strict: raise for missing and unexpected tensors; else they are only reported, and missing ones keep their values.
        verified: `verify_on_all_ranks` has just compared every byte, so it is not repeated.

    Returns:
        The checkpoint's iteration, and the tensors that are missing or unexpected.

    Raises:
        CheckpointError: on all ranks. If a tensor does not fit, the message has the saved and the requested shape or dtype.
    """
    if mesh is None:
        mesh = Mesh.single()
    world = mesh.world
    manifest, tasks, missing = run_on_all_ranks(world, lambda: _prepare(directory, parts, strict))
    state = run_on_all_ranks(world, lambda: _read_scalars(directory, parts, strict))
    # A tensor is unexpected only if no rank requests it: each rank knows only the names of its own pipeline stages.
    own_names = sorted({f"{prefix}.{s.name}" for prefix, part in parts.items() for s in part.shards()})
    requested = [own_names]
    if world.group is not None:
        requested = [[] for _ in range(world.size)]
        dist.all_gather_object(requested, own_names, group=world.group)
    known = {name for names in requested for name in names}
    unexpected = tuple(n for n in manifest.tensors if n.split(".", 1)[0] in parts and n not in known)
    if strict and unexpected:
        hint = "the configuration of this run has no such tensors; compare it with the checkpoint's config.json"
        raise CheckpointError(f"{directory}: {len(unexpected)} unexpected tensors: {shorten_list(unexpected)}: {hint}")
    # The last check and the slowest. Only after it are values changed.
    if not verified:
        verify_on_all_ranks(directory, world)
    run_on_all_ranks(world, lambda: _fill(directory, tasks))
    run_on_all_ranks(world, lambda: _load_scalars(directory, parts, state))
    return LoadReport(manifest.iteration, missing, unexpected)


@dataclass(frozen=True)
class ReadTask:
    """Copy of slices of one saved piece into a tensor. dtype: safetensors code of the saved piece."""

    piece: Piece
    dtype: str
    copy: Copy
    target: Tensor


def shorten_list(names: Iterable[str]) -> str:
    """Join names for a message, at most MAX_NAMES_SHOWN of them."""
    listed = list(names)
    return ", ".join(listed[:MAX_NAMES_SHOWN]) + (", ..." if len(listed) > MAX_NAMES_SHOWN else "")


def _prepare(
    directory: Path, parts: Mapping[str, Checkpointable], strict: bool
) -> tuple[Manifest, list[ReadTask], tuple[str, ...]]:
    manifest = read_manifest(directory)
    check_sizes(directory, manifest)
    tasks: list[ReadTask] = []
    missing: list[str] = []
    mismatches: list[str] = []
    for prefix, part in parts.items():
        for shard in part.shards():
            name = f"{prefix}.{shard.name}"
            record = manifest.tensors.get(name)
            if record is None:
                missing.append(name)
            elif why := _describe_mismatch(record, shard):
                mismatches.append(f"{name}: {why}")
            elif not shard.part.empty:
                tasks += _read_tasks(record, shard.part, shard.data)
    if mismatches:
        raise CheckpointError(f"{directory}: {len(mismatches)} tensors do not fit: " + "; ".join(mismatches[:MAX_NAMES_SHOWN]))
    if missing and strict:
        raise CheckpointError(f"{directory}: {len(missing)} tensors are not in the checkpoint: {shorten_list(missing)}")
    return manifest, tasks, tuple(missing)


def _describe_mismatch(record: TensorRecord, shard: Shard) -> str | None:
    if record.shape != shard.shape:
        return f"the checkpoint has shape {list(record.shape)}, requested is {list(shard.shape)}"
    # Floating-point values are cast, because a run may change its precision. Integers are counts and are never cast.
    if DTYPE_FROM_CODE[record.dtype].is_floating_point != shard.dtype.is_floating_point:
        return f"the checkpoint has {DTYPE_FROM_CODE[record.dtype]}, requested is {shard.dtype}"
    return None


def _read_tasks(record: TensorRecord, wanted: Part, target: Tensor) -> list[ReadTask]:
    copies = find_copies(wanted, [p.part for p in record.pieces])
    return [ReadTask(record.pieces[c.piece], record.dtype, c, target) for c in copies]


def _fill(directory: Path, tasks: Iterable[ReadTask]) -> None:
    # Grouped by file, so that each file is opened once, however many slices this rank reads from it.
    by_file: dict[str, list[ReadTask]] = defaultdict(list)
    for task in tasks:
        by_file[task.piece.file].append(task)
    with torch.no_grad():
        for name, file_tasks in sorted(by_file.items()):
            with open_safetensors(checked_path(directory, name)) as file:
                keys = set(file.keys())
                for task in file_tasks:
                    if task.piece.key not in keys:
                        raise CheckpointError(f"{directory / name}: it has no {task.piece.key!r}, which the manifest lists")
                    task.target[task.copy.target].copy_(_read(directory / name, file, task))


def _read_scalars(directory: Path, parts: Mapping[str, Checkpointable], strict: bool) -> dict[str, dict[str, Any]]:
    state = read_state(directory)
    if lacking := [prefix for prefix in parts if strict and prefix not in state]:
        raise CheckpointError(f"{directory / STATE}: it has no {shorten_list(lacking)}")
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
def open_safetensors(path: Path) -> Iterator[Any]:
    """Open a safetensors file; an error while it is open becomes a CheckpointError that names the file."""
    try:
        check_regular(path)  # safe_open maps the file into memory, and a pipe or a device could block it
        with safe_open(str(path), framework="pt") as file:
            yield file
    except (OSError, MemoryError, SafetensorError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file: {error_reason(error)}") from error


def _read(path: Path, file: Any, task: ReadTask) -> Tensor:
    """Read a task's slices of its piece. CheckpointError when the file's own header contradicts the manifest."""
    saved = file.get_slice(task.piece.key)
    shape, dtype = tuple(saved.get_shape()), saved.get_dtype()
    if (shape, dtype) != (task.piece.part.shape, task.dtype):
        listed = f"{task.piece.part.shape} {task.dtype}"
        raise CheckpointError(f"{path}: {task.piece.key!r} is {shape} {dtype}, the manifest says {listed}")
    # A scalar has no slices.
    tensor: Tensor = saved[task.copy.source] if shape else file.get_tensor(task.piece.key)
    return tensor


def read_tensor(directory: Path, manifest: Manifest, name: str) -> Tensor:
    """Read one full tensor from its pieces, without comparing its bytes with the manifest.

    Args:
        directory: the checkpoint's directory.
        manifest: the checkpoint's manifest.
        name: global name of the tensor, which begins with its part.

    Returns:
        The tensor `[*shape]` in its saved dtype, on the CPU.

    Raises:
        CheckpointError: as `load`.
    """
    record = manifest.tensors[name]
    tensor = torch.empty(record.shape, dtype=DTYPE_FROM_CODE[record.dtype])
    _fill(directory, _read_tasks(record, Part.whole(record.shape), tensor))
    return tensor
