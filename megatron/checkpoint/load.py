"""Load a checkpoint, saved under any parallel layout, into the tensors of any other, in place.

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
from megatron.checkpoint.storage import TORCH_DTYPES
from megatron.files.regular import check_regular, error_reason
from megatron.launch.watchdog import Watchdog
from megatron.mesh.mesh import Axis, Mesh
from megatron.parallel.spec import Checkpointable, Part, Shard

MAX_NAMES_SHOWN = 20


@dataclass(frozen=True)
class LoadReport:
    """Report of a load.

    iteration: of the checkpoint. missing: tensors that were asked for and are not in it. unexpected: tensors in it that no rank
    asked for.
    """

    iteration: int
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]


def verify_on_all_ranks(directory: Path, world: Axis, watch: Watchdog | None = None) -> None:
    """Compare every byte of a checkpoint with its manifest. Collective; the ranks share the files, and each reads its own.

    Args:
        directory: of the checkpoint, which every rank sees.
        world: the ranks that share the work.
        watch: learns what this rank is busy with.

    Raises:
        CheckpointError: on all ranks, naming the file, when one of them finds a difference.
    """
    ranks = range(world.size)

    def mine() -> None:
        manifest = read_manifest(directory)
        check_sizes(directory, manifest)
        names = sorted(manifest.files)
        readers = assign_evenly([manifest.files[name].bytes for name in names], [ranks] * len(names))
        own = [name for name, reader in zip(names, readers, strict=True) if reader == world.rank]
        # Said anew for every chunk: a large file is not one that hangs.
        tell = None if watch is None else partial(watch.doing, alone=True)
        check_bytes(directory, manifest, own, tell or (lambda what: None))

    run_on_all_ranks(world, mine, watch, f"comparing {directory} with its checksums")


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
        directory: as `find_checkpoint` returns it.
        parts: what to fill, by the prefix of its tensors' names. Other parts of the checkpoint are left alone: {"model": ...}
            takes the weights only. Values are cast to the dtype of the tensor they go to.
        mesh: of the run, so that what one rank does not ask for another may; None: this process is the whole run.
        strict: take missing and unexpected tensors for an error; else they are only reported, and missing ones keep their
            values.
        verified: every byte was just compared by `verify_on_all_ranks`, so that it is not done again.

    Returns:
        The iteration, and the tensors that are missing or unexpected.

    Raises:
        CheckpointError: on all ranks; the message says what does not fit, with the checkpoint's value and the requested one.
    """
    if mesh is None:
        mesh = Mesh.single()
    world = mesh.world
    manifest, tasks, missing = run_on_all_ranks(world, lambda: _prepare(directory, parts, strict))
    state = run_on_all_ranks(world, lambda: _scalars(directory, parts, strict))
    # A tensor is unexpected where no rank asks for it: each rank knows only the names of its own stages.
    mine = sorted({f"{prefix}.{s.name}" for prefix, part in parts.items() for s in part.shards()})
    asked = [mine]
    if world.group is not None:
        asked = [[] for _ in range(world.size)]
        dist.all_gather_object(asked, mine, group=world.group)
    known = {name for names in asked for name in names}
    unexpected = tuple(n for n in manifest.tensors if n.split(".", 1)[0] in parts and n not in known)
    if strict and unexpected:
        hint = "the configuration of this run has no such tensors; compare it with the checkpoint's config.json"
        raise CheckpointError(f"{directory}: {len(unexpected)} unexpected tensors: {shorten_list(unexpected)}: {hint}")
    # The last check, and the longest. After it values change.
    if not verified:
        verify_on_all_ranks(directory, world)
    run_on_all_ranks(world, lambda: _fill(directory, tasks))
    run_on_all_ranks(world, lambda: _load_scalars(directory, parts, state))
    return LoadReport(manifest.iteration, missing, unexpected)


@dataclass(frozen=True)
class ReadTask:
    """Slices of one saved piece to be read, and the tensor that takes them. dtype: safetensors code of the saved piece."""

    piece: Piece
    dtype: str
    copy: Copy
    target: Tensor


def shorten_list(names: Iterable[str]) -> str:
    """Return the first names of many, for a message."""
    listed = list(names)
    return ", ".join(listed[:MAX_NAMES_SHOWN]) + (", ..." if len(listed) > MAX_NAMES_SHOWN else "")


def _prepare(
    directory: Path, parts: Mapping[str, Checkpointable], strict: bool
) -> tuple[Manifest, list[ReadTask], tuple[str, ...]]:
    manifest = read_manifest(directory)
    check_sizes(directory, manifest)
    tasks: list[ReadTask] = []
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
                tasks += _read_tasks(record, shard.part, shard.data)
    if wrong:
        raise CheckpointError(f"{directory}: {len(wrong)} tensors do not fit: " + "; ".join(wrong[:MAX_NAMES_SHOWN]))
    if missing and strict:
        raise CheckpointError(f"{directory}: {len(missing)} tensors are not in the checkpoint: {shorten_list(missing)}")
    return manifest, tasks, tuple(missing)


def _misfit(record: TensorRecord, shard: Shard) -> str | None:
    if record.shape != shard.shape:
        return f"the checkpoint has shape {list(record.shape)}, requested is {list(shard.shape)}"
    # Between floating-point types values are cast, as a run may change its precision. An integer is a count, and is not.
    if TORCH_DTYPES[record.dtype].is_floating_point != shard.dtype.is_floating_point:
        return f"the checkpoint has {TORCH_DTYPES[record.dtype]}, requested is {shard.dtype}"
    return None


def _read_tasks(record: TensorRecord, wanted: Part, target: Tensor) -> list[ReadTask]:
    found = find_copies(wanted, [p.part for p in record.pieces])
    return [ReadTask(record.pieces[c.piece], record.dtype, c, target) for c in found]


def _fill(directory: Path, tasks: Iterable[ReadTask]) -> None:
    # File by file, so that each is opened once, however many slices this rank takes from it.
    by_file: dict[str, list[ReadTask]] = defaultdict(list)
    for task in tasks:
        by_file[task.piece.file].append(task)
    with torch.no_grad():
        for name, listed in sorted(by_file.items()):
            with open_safetensors(checked_path(directory, name)) as file:
                keys = set(file.keys())
                for task in listed:
                    if task.piece.key not in keys:
                        raise CheckpointError(f"{directory / name}: it has no {task.piece.key!r}, which the manifest lists")
                    task.target[task.copy.target].copy_(_read(directory / name, file, task))


def _scalars(directory: Path, parts: Mapping[str, Checkpointable], strict: bool) -> dict[str, dict[str, Any]]:
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
    """Open a safetensors file; whatever is wrong with it becomes a CheckpointError that names it."""
    try:
        check_regular(path)  # safe_open maps it: a pipe or a device would block, or worse
        with safe_open(str(path), framework="pt") as file:
            yield file
    except (OSError, MemoryError, SafetensorError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file: {error_reason(error)}") from error


def _read(path: Path, file: Any, task: ReadTask) -> Tensor:
    """Read the wanted slices of one piece. CheckpointError when the file's own header contradicts the manifest."""
    saved = file.get_slice(task.piece.key)
    shape, dtype = tuple(saved.get_shape()), saved.get_dtype()
    if (shape, dtype) != (task.piece.part.shape, task.dtype):
        listed = f"{task.piece.part.shape} {task.dtype}"
        raise CheckpointError(f"{path}: {task.piece.key!r} is {shape} {dtype}, the manifest says {listed}")
    # A scalar has no slices.
    tensor: Tensor = saved[task.copy.source] if shape else file.get_tensor(task.piece.key)
    return tensor


def read_tensor(directory: Path, manifest: Manifest, name: str) -> Tensor:
    """Read one whole tensor, put together from its pieces; its bytes are not compared with the manifest.

    Args:
        directory: of the checkpoint.
        manifest: the checkpoint's.
        name: global name of the tensor, with its part in front.

    Returns:
        The tensor `[*shape]` in the dtype that it was saved in, on the CPU.

    Raises:
        CheckpointError: as `load`.
    """
    record = manifest.tensors[name]
    whole = torch.empty(record.shape, dtype=TORCH_DTYPES[record.dtype])
    _fill(directory, _read_tasks(record, Part.whole(record.shape), whole))
    return whole
