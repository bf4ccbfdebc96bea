"""Save: every piece of every tensor once, the writing shared by all ranks, and either a whole checkpoint or none.

Only descriptions travel between ranks, never tensor data: the first rank learns who holds what, decides who writes what,
and each rank writes its own file into a temporary directory beside the final one. When all have succeeded the first rank
adds the manifest, renames the directory, and replaces the tracker last. Whatever fails, on whichever rank, fails on all.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron.checkpoint.layout import (
    CONFIG,
    MANIFEST,
    STATE,
    TOKENIZER,
    TRACKER,
    CheckpointError,
    Manifest,
    Piece,
    TensorRecord,
    directory_name,
    iterations,
    read_manifest,
)
from megatron.checkpoint.shards import assign, fault
from megatron.checkpoint.storage import DTYPES, Entry, FileRecord, Storage, record_of, safetensors
from megatron.mesh.mesh import Axis, Mesh
from megatron.parallel.spec import Checkpointable, Part, Shard

T = TypeVar("T")
Assets = Callable[[Path], object] | Mapping[str, bytes] | None
LEFTOVER = re.compile(r"\.iter_\d{7,}\.(tmp|deleted)")


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


def save(
    root: Path,
    iteration: int,
    parts: Mapping[str, Checkpointable],
    mesh: Mesh,
    *,
    config: Mapping[str, Any],
    assets: Assets = None,
    keep_last: int | None = None,
    keep_every: int | None = None,
    storage: Storage | None = None,
) -> Path:
    """Write `root/iter_<iteration>` and make it the latest. Collective over `mesh.world`.

    parts: what to save, by the prefix of its tensors' names; the same prefixes on all ranks.
    config: the run's merged configuration, JSON values. assets: the tokenizer's files, as name -> bytes or as a function
    that writes them into the directory it is given; the first rank's are taken.
    keep_last: afterwards only so many of the newest whole checkpoints stay, plus those at multiples of `keep_every`.
    `root` is one directory that all ranks see. Returns the new directory.
    CheckpointError on all ranks when anything fails on one of them; the tracker has then not moved.
    """
    storage, world = storage or Storage(), mesh.world
    final, temporary = root / directory_name(iteration), root / f".{directory_name(iteration)}.tmp"
    try:
        local = together(world, lambda: _local(parts))
        held = _gather(world, [Held(name, s.dtype, s.shape, s.part) for (name, _), s in local.items()])
        plan = together(world, lambda: _begin(storage, temporary, held) if held is not None else None)
        writes = _scatter(world, plan.writes if plan else [])
        record = together(world, lambda: _write_shards(storage, temporary / shard_name(world.rank), local, writes))
        records = _gather(world, record)

        def commit() -> None:
            if plan is not None:
                files = {shard_name(r): f for r, f in enumerate(records or ()) if f is not None}
                files |= _write_rest(storage, temporary, parts, config, assets)
                manifest = Manifest(iteration, files, plan.tensors)
                _commit(storage, root, temporary, final, manifest)

        together(world, commit)
    except CheckpointError as error:
        if world.first:
            _discard(storage, temporary)
        raise CheckpointError(f"{final}: could not be saved: {error}") from error
    if world.first:
        prune(root, iteration, keep_last, keep_every, storage)
    return final


def shard_name(rank: int) -> str:
    return f"shard_{rank:05d}.safetensors"


def together(world: Axis, work: Callable[[], T]) -> T:
    """Run `work` on every rank; when it fails on one, raise CheckpointError on all, naming each rank that failed."""
    result, failure = None, None
    try:
        result = work()
    except Exception as error:  # whatever it is, the other ranks must not wait for this one
        if world.group is None:
            raise error if isinstance(error, CheckpointError) else CheckpointError(_tell(error)) from error
        failure = _tell(error)
    if world.group is not None:
        failures: list[str | None] = [None] * world.size
        dist.all_gather_object(failures, failure, group=world.group)
        told = {f: [r for r, other in enumerate(failures) if other == f] for f in failures if f is not None}
        if told:
            raise CheckpointError("; ".join(f"rank {', '.join(map(str, ranks))}: {f}" for f, ranks in told.items()))
    return result  # type: ignore[return-value]  # None only where work gave None


def _tell(error: Exception) -> str:
    if isinstance(error, CheckpointError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return f"{type(error).__name__}: {error}"


def _gather(world: Axis, value: T) -> list[T] | None:
    """Every rank's value on the first rank, None on the others."""
    if world.group is None:
        return [value]
    values: list[Any] | None = [None] * world.size if world.first else None
    dist.gather_object(value, values, dst=world.ranks[0], group=world.group)
    return values


def _scatter(world: Axis, values: Sequence[T]) -> T:
    """One value of the first rank's list for each rank; the others' lists are not looked at."""
    if world.group is None:
        return values[0]
    mine: list[Any] = [None]
    dist.scatter_object_list(mine, list(values) if world.first else None, src=world.ranks[0], group=world.group)
    result: T = mine[0]
    return result


def _local(parts: Mapping[str, Checkpointable]) -> dict[tuple[str, Part], Shard]:
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


def _begin(storage: Storage, temporary: Path, held: Sequence[Sequence[Held]]) -> Plan:
    """First rank: decide who writes what, and clear the place."""
    plan = make_plan(held)
    storage.remove(temporary)
    storage.make_directory(temporary)
    return plan


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
    sizes = [known[name].dtype.itemsize * _elements(part) for name, part in pieces]
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


def _elements(part: Part) -> int:
    count = 1
    for n in part.shape:
        count *= n
    return count


def _write_shards(
    storage: Storage, path: Path, local: Mapping[tuple[str, Part], Shard], writes: Mapping[str, tuple[str, Part]]
) -> FileRecord | None:
    """This rank's file; None when it has nothing to write."""
    if not writes:
        return None
    entries = [Entry(key, local[piece].dtype, piece[1].shape, local[piece].data.detach) for key, piece in writes.items()]
    return storage.write(path, safetensors(entries, {"format": "pt"}))


def _json(values: Mapping[str, Any]) -> list[bytes]:
    return [(json.dumps(values, indent=1, allow_nan=False) + "\n").encode()]


def _write_rest(
    storage: Storage, temporary: Path, parts: Mapping[str, Checkpointable], config: Mapping[str, Any], assets: Assets
) -> dict[str, FileRecord]:
    """First rank: the configuration, the scalars and the tokenizer's files."""
    files = {CONFIG: storage.write(temporary / CONFIG, _json(config))}
    files[STATE] = storage.write(temporary / STATE, _json({name: part.scalars() for name, part in parts.items()}))
    if assets is None:
        return files
    folder = temporary / TOKENIZER
    storage.make_directory(folder)
    if callable(assets):
        assets(folder)
    else:
        for name, content in assets.items():
            storage.write(folder / name, [content])
    for path in sorted(folder.rglob("*")):
        storage.sync(path)
        if path.is_file():
            files[path.relative_to(temporary).as_posix()] = record_of(path)
    storage.sync(folder)
    return files


def _commit(storage: Storage, root: Path, temporary: Path, final: Path, manifest: Manifest) -> None:
    """First rank: everything is written; make it the latest checkpoint in steps that can each be the last."""
    for name, record in manifest.files.items():
        path = temporary / name
        if not path.is_file() or path.stat().st_size != record.bytes:
            raise CheckpointError(f"{path}: not here as it was written. Save to a directory that all ranks share")
    storage.write(temporary / MANIFEST, [manifest.to_text().encode()])
    storage.sync(temporary)
    replaced = final.with_name(final.name + ".replaced")
    if final.exists():
        storage.remove(replaced)
        storage.rename(final, replaced)
    storage.rename(temporary, final)
    pending = root / f".{TRACKER}.tmp"
    storage.write(pending, [f"{manifest.iteration}\n".encode()])
    storage.rename(pending, root / TRACKER)
    try:
        storage.remove(replaced)
    except OSError as error:
        _warn(replaced, error)


def _discard(storage: Storage, temporary: Path) -> None:
    try:
        storage.remove(temporary)
    except OSError as error:
        _warn(temporary, error)


def _warn(path: Path, error: OSError) -> None:
    logging.getLogger(__name__).warning("%s: could not be removed: %s", path, error.strerror)


def prune(root: Path, newest: int, keep_last: int | None, keep_every: int | None, storage: Storage | None = None) -> list[Path]:
    """Delete whole checkpoints older than iteration `newest`, beyond the `keep_last` newest; and leftovers of crashes.

    Multiples of `keep_every` stay. A directory is renamed before it is deleted, so that none is ever half there. Returns
    what was deleted; what cannot be deleted is logged and stays.
    """
    storage, deleted = storage or Storage(), []
    older = [(n, path) for n, path in iterations(root).items() if n < newest and _whole(path)]
    spare = older[: max(0, len(older) - (keep_last - 1))] if keep_last is not None and keep_last > 0 else []
    for number, path in spare:
        if keep_every and number % keep_every == 0:
            continue
        doomed = root / f".{directory_name(number)}.deleted"
        try:
            storage.remove(doomed)
            storage.rename(path, doomed)
            deleted.append(path)
        except OSError as error:
            _warn(path, error)
    for path in sorted(root.iterdir()):
        succeeded = path.name.endswith(".replaced") and path.with_suffix("").is_dir()
        if LEFTOVER.fullmatch(path.name) or succeeded:
            _discard(storage, path)
    return deleted


def _whole(path: Path) -> bool:
    try:
        read_manifest(path)
    except CheckpointError:
        return False
    return True
