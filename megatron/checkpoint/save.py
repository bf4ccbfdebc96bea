"""Save: every piece of every tensor once, the writing shared by all ranks, and either a whole checkpoint or none.

Each rank writes its own file into a temporary directory beside the final one. When all have succeeded the first rank adds
the small files and the manifest, renames the directory, and replaces the tracker last. Whatever fails, on whichever rank,
fails on all.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from megatron.checkpoint.agreement import DiskError, gather, together
from megatron.checkpoint.content import Assets, Content, Contents, shard_name
from megatron.checkpoint.layout import (
    DIRECTORY,
    MANIFEST,
    NEXT_TRACKER,
    TRACKER,
    CheckpointError,
    Manifest,
    check_sizes,
    directory_name,
    iterations,
    read_manifest,
)
from megatron.checkpoint.storage import FileRecord, Storage, safetensors
from megatron.files.outputs import holds_other_files
from megatron.launch.watchdog import Watchdog
from megatron.mesh.mesh import Axis, Mesh
from megatron.parallel.spec import Checkpointable

UNFINISHED = re.compile(r"\.iter_(\d{7,})\.tmp")
DELETED = re.compile(r"\.iter_\d{7,}\.deleted")


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
    """Write `root/iter_<iteration>` and make it the latest. Collective over `mesh.world`. A run uses `train.saving.Saver`.

    parts: what to save, by the prefix of its tensors' names; the same prefixes on all ranks.
    config: the run's merged configuration, JSON values. assets: the tokenizer's files, as name -> bytes or as a function
    that writes them into the directory it is given; the first rank's are taken.
    keep_last: afterwards only so many of the newest whole checkpoints stay, plus those at multiples of `keep_every`.
    `root` is one directory that all ranks see. Returns the new directory.
    CheckpointError on all ranks when anything fails on one of them; the tracker has then not moved.
    """
    storage = storage or Storage()
    try:
        content = Contents(mesh.world).take(iteration, parts, config, assets)
    except CheckpointError as error:
        raise type(error)(f"{root / directory_name(iteration)}: could not be saved: {error}") from error
    final = write(root, content, mesh.world, storage)
    if mesh.world.first:
        prune(root, iteration, keep_last, keep_every, storage)
    return final


def write(root: Path, content: Content, world: Axis, storage: Storage, watch: Watchdog | None = None) -> Path:
    """Write a checkpoint and make it the latest; it is on disk when this returns. Collective over `world`.

    watch: told what this rank does. CheckpointError as `save`; DiskError when the disk alone is to blame.
    """
    name = directory_name(content.iteration)
    final, temporary = root / name, root / f".{name}.tmp"
    watch = watch or Watchdog()
    try:
        together(
            world, lambda: _begin(storage, root, temporary, content) if world.first else None, watch, f"making room in {root}"
        )
        own = temporary / shard_name(world.rank)
        record = together(world, lambda: _write_shard(storage, own, content, watch), watch, f"writing {own}")
        records = gather(world, record)

        def commit() -> None:
            if records is not None:
                files = {shard_name(rank): record for rank, record in enumerate(records) if record is not None}
                files |= _write_small_files(storage, temporary, content.files)
                _commit(storage, root, temporary, final, Manifest(content.iteration, files, content.tensors))

        together(world, commit, watch, f"committing {final}")
    except CheckpointError as error:
        if world.first:
            _discard(storage, temporary)
        raise type(error)(f"{final}: could not be saved: {error}") from error
    return final


def _begin(storage: Storage, root: Path, temporary: Path, content: Content) -> None:
    """First rank: clear the place, and see that there is room before an hour is spent on writing."""
    if not root.is_dir():
        storage.make_directory(root)
        storage.sync(root.parent)
    if foreign := [path for path in iterations(root).values() if holds_other_files(path)]:
        raise CheckpointError(f"{foreign[0]}: is no checkpoint of this program; take it away, or save to another directory")
    storage.remove(temporary)
    free, needed = storage.free(root), content.bytes
    if free is not None and free < needed:
        delete(_leftovers(root, storage), storage)
        free = storage.free(root)
    if free is not None and free < needed:
        raise DiskError(
            f"{root}: no space: the checkpoint has {needed} bytes ({needed / 1e9:.1f} GB), and {free} ({free / 1e9:.1f} GB) "
            "are free. Delete something there; with --keep-last N only the newest N checkpoints stay"
        )
    storage.make_directory(temporary)


def _write_shard(storage: Storage, path: Path, content: Content, watch: Watchdog) -> FileRecord | None:
    """This rank's file; None when it has nothing to write."""
    if not content.entries:
        return None

    def chunks() -> Iterator[bytes | memoryview]:
        written = 0
        for chunk in safetensors(content.entries, {"format": "pt"}):
            # Said anew for every tensor: a slow disk is not one that hangs.
            watch.doing(f"writing {path} after {written} bytes", alone=True)
            yield chunk
            written += len(chunk)
        watch.doing(f"waiting for the disk to have {path}", alone=True)

    return storage.write(path, chunks())


def _write_small_files(storage: Storage, temporary: Path, files: Mapping[str, bytes]) -> dict[str, FileRecord]:
    records, folders = {}, set()
    for name, content in files.items():
        for folder in PurePosixPath(name).parents[:-1]:
            if folder not in folders:
                storage.make_directory(temporary / folder)
                folders.add(folder)
        records[name] = storage.write(temporary / name, [content])
    for folder in sorted(folders, reverse=True):  # the inner ones first
        storage.sync(temporary / folder)
    return records


def _commit(storage: Storage, root: Path, temporary: Path, final: Path, manifest: Manifest) -> None:
    """First rank: everything is written; make it the latest checkpoint in steps that can each be the last."""
    for name, record in manifest.files.items():
        path = temporary / name
        if not path.is_file() or path.stat().st_size != record.bytes:
            raise CheckpointError(
                f"{path}: not here as it was written. Save to a directory that all ranks share, and that no other job saves to"
            )
    storage.write(temporary / MANIFEST, [manifest.to_text().encode()])
    storage.sync(temporary)
    if final.exists():
        aside = final.with_name(final.name + ".replaced")
        if aside.exists():  # a whole one, perhaps, whose successor is not
            aside = root / f".{final.name}.deleted"
            storage.remove(aside)
        storage.rename(final, aside)
    # Written before the directory has its name: whoever finds both knows that this save is the latest, also where the tracker
    # was not replaced any more. After another of this iteration was set aside, which the number would else announce.
    pending = root / NEXT_TRACKER
    storage.write(pending, [f"{manifest.iteration}\n".encode()])
    storage.sync(root)
    storage.rename(temporary, final)
    storage.rename(pending, root / TRACKER)


def _discard(storage: Storage, path: Path) -> None:
    try:
        storage.remove(path)
    except OSError as error:
        _warn(path, error)


def _warn(path: Path, error: OSError) -> None:
    logging.getLogger(__name__).warning("%s: could not be removed: %s", path, error.strerror)


def set_aside(root: Path, newest: int, keep_last: int | None, keep_every: int | None, storage: Storage) -> list[Path]:
    """Rename the whole checkpoints older than iteration `newest` that are beyond the `keep_last` newest ones, and leftovers.

    Called when `newest` is complete, and nothing is being written. Multiples of `keep_every` stay. From then on nobody finds
    them, so that none is ever half there. Returns what is now to be deleted: names that no save ever uses, since the deletion
    may last into later ones. What cannot be renamed is logged and stays.
    """
    older = [item for item in reversed(iterations(root).items()) if item[0] < newest] if keep_last else []
    kept = 1
    for number, path in older:
        spare = kept >= (keep_last or 0)
        if (spare and keep_every and number % keep_every == 0) or not _whole(path):
            continue
        if spare:
            put_aside(path, number, root, storage)
        kept += 1
    return _leftovers(root, storage)


def _leftovers(root: Path, storage: Storage) -> list[Path]:
    """What is no checkpoint any more, or never was one: left by a crash, or replaced by a second save; set aside as well."""
    for path in sorted(root.iterdir()):
        unfinished, directory = UNFINISHED.fullmatch(path.name), DIRECTORY.fullmatch(path.name)
        if unfinished:
            put_aside(path, int(unfinished[1]), root, storage)
        elif directory and directory[2] and not holds_other_files(path) and _whole(path.with_suffix("")):
            put_aside(path, int(directory[1]), root, storage)
    return sorted(path for path in root.iterdir() if DELETED.fullmatch(path.name))


def put_aside(path: Path, number: int, root: Path, storage: Storage) -> None:
    """Rename a directory so that nobody finds it and the next deletion takes it. What cannot be renamed is logged and stays."""
    doomed = root / f".{directory_name(number)}.deleted"
    if doomed.exists():  # it is being deleted; the next time
        return
    try:
        storage.rename(path, doomed)
    except OSError as error:
        _warn(path, error)


def _whole(path: Path) -> bool:
    try:
        check_sizes(path, read_manifest(path))
    except CheckpointError:
        return False
    return True


def delete(paths: list[Path], storage: Storage) -> None:
    """Delete what was set aside. What cannot be deleted is logged and stays until the next time."""
    for path in paths:
        _discard(storage, path)


def prune(root: Path, newest: int, keep_last: int | None, keep_every: int | None, storage: Storage | None = None) -> None:
    """Both at once."""
    storage = storage or Storage()
    try:
        delete(set_aside(root, newest, keep_last, keep_every, storage), storage)
    except OSError as error:
        _warn(root, error)
