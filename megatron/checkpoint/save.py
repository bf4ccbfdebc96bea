"""Save a checkpoint: every piece of every tensor once, the writing shared by all ranks, and either all of it or nothing.

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

from megatron.checkpoint.agreement import DiskError, gather_objects, run_on_all_ranks
from megatron.checkpoint.layout import (
    DIRECTORY,
    MANIFEST,
    NEXT_TRACKER,
    TRACKER,
    CheckpointError,
    Manifest,
    check_sizes,
    directory_name,
    iteration_directories,
    read_manifest,
)
from megatron.checkpoint.save_plan import Assets, Planner, SavePlan, shard_name
from megatron.checkpoint.storage import FileRecord, Storage, stream_safetensors
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

    Args:
        root: one directory that all ranks see.
        iteration: which the state is of.
        parts: what to save, by the prefix of its tensors' names; the same prefixes on all ranks.
        mesh: of the run.
        config: the run's merged configuration, JSON values.
        assets: the tokenizer's files, as name -> bytes or as a function that returns them; the first rank's are taken.
        keep_last: number of the newest whole checkpoints that stay; None: all.
        keep_every: multiples of it stay too.
        storage: the disk.

    Returns:
        The new directory.

    Raises:
        CheckpointError: on all ranks, when anything fails on one of them; the tracker has then not moved.
    """
    storage = storage or Storage()
    try:
        plan = Planner(mesh.world).plan(iteration, parts, config, assets)
    except CheckpointError as error:
        raise type(error)(f"{root / directory_name(iteration)}: could not be saved: {error}") from error
    final = write_checkpoint(root, plan, mesh.world, storage)
    if mesh.world.first:
        prune(root, iteration, keep_last, keep_every, storage)
    return final


def write_checkpoint(root: Path, plan: SavePlan, world: Axis, storage: Storage, watch: Watchdog | None = None) -> Path:
    """Write a checkpoint and make it the latest; it is on disk when this returns. Collective over `world`.

    Args:
        root: one directory that all ranks see.
        plan: of this rank.
        world: the ranks that save.
        storage: the disk.
        watch: learns what this rank is busy with.

    Returns:
        The new directory.

    Raises:
        DiskError: on all ranks, when the disk alone is to blame.
        CheckpointError: on all ranks, when anything else fails on one of them.
    """
    name = directory_name(plan.iteration)
    # Beside the final directory, so on its file system: a rename is atomic there alone.
    final, temporary = root / name, root / f".{name}.tmp"
    watch = watch or Watchdog()
    try:
        run_on_all_ranks(
            world,
            lambda: _prepare_directory(storage, root, temporary, plan) if world.first else None,
            watch,
            f"making room in {root}",
        )
        own = temporary / shard_name(world.rank)
        record = run_on_all_ranks(world, lambda: _write_shard(storage, own, plan, watch), watch, f"writing {own}")
        records = gather_objects(world, record)

        def commit() -> None:
            if records is not None:
                files = {shard_name(rank): record for rank, record in enumerate(records) if record is not None}
                files |= _write_small_files(storage, temporary, plan.files)
                _commit(storage, root, temporary, final, Manifest(plan.iteration, files, plan.tensors))

        run_on_all_ranks(world, commit, watch, f"committing {final}")
    except CheckpointError as error:
        if world.first:
            _discard(storage, temporary)
        raise type(error)(f"{final}: could not be saved: {error}") from error
    return final


def _prepare_directory(storage: Storage, root: Path, temporary: Path, plan: SavePlan) -> None:
    """Clear the place, and check that there is room before an hour is spent on writing. The first rank does it for all."""
    if not root.is_dir():
        storage.make_directory(root)
        storage.sync(root.parent)  # a new directory outlives a power cut once its parent is on disk
    if foreign := [path for path in iteration_directories(root).values() if holds_other_files(path)]:
        raise CheckpointError(f"{foreign[0]}: is no checkpoint of this program; take it away, or save to another directory")
    storage.remove(temporary)
    # What an earlier save left over is deleted only where its room is needed: deleting may take long, and everybody waits here.
    free, needed = storage.free_bytes(root), plan.bytes
    if free is not None and free < needed:
        delete_retired(_leftovers(root, storage), storage)
        free = storage.free_bytes(root)
    if free is not None and free < needed:
        raise DiskError(
            f"{root}: no space: the checkpoint has {needed} bytes ({needed / 1e9:.1f} GB), and {free} ({free / 1e9:.1f} GB) "
            "are free. Delete something there; with --keep-last N only the newest N checkpoints stay"
        )
    storage.make_directory(temporary)


def _write_shard(storage: Storage, path: Path, plan: SavePlan, watch: Watchdog) -> FileRecord | None:
    """Write this rank's file. None when it has nothing to write."""
    if not plan.entries:
        return None

    def chunks() -> Iterator[bytes | memoryview]:
        written = 0
        for chunk in stream_safetensors(plan.entries, {"format": "pt"}):
            # A new phase for every tensor, whose time begins anew: a slow disk is not one that hangs.
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
    # `write` has put the files' bytes on disk; their names are entries of the directories. The inner ones first.
    for folder in sorted(folders, reverse=True):
        storage.sync(temporary / folder)
    return records


def _commit(storage: Storage, root: Path, temporary: Path, final: Path, manifest: Manifest) -> None:
    """Make what was written the latest checkpoint, in steps that can each be the last. The first rank does it for all."""
    # 1. The first rank sees every other rank's file: where it does not, the ranks do not share the directory.
    for name, record in manifest.files.items():
        path = temporary / name
        if not path.is_file() or path.stat().st_size != record.bytes:
            raise CheckpointError(
                f"{path}: not here as it was written. Save to a directory that all ranks share, and that no other job saves to"
            )
    # 2. The manifest is written when all that it lists is on disk, and its directory is synced before it gets its name: so a
    #    directory with a name and a manifest is whole, also after a power cut.
    storage.write(temporary / MANIFEST, [manifest.to_text().encode()])
    storage.sync(temporary)
    # 3. An earlier save of this iteration makes room. It keeps counting under its second name until the new one is there.
    if final.exists():
        aside = final.with_name(final.name + ".replaced")
        if aside.exists():  # a whole one, perhaps, whose successor is not
            aside = root / f".{final.name}.deleted"
            storage.remove(aside)
        storage.rename(final, aside)
    # 4. The next tracker is written before the directory has its name: whoever finds both knows that this save is the latest,
    #    also where the tracker was not replaced any more. And after step 3, since its number would announce the earlier save.
    pending = root / NEXT_TRACKER
    storage.write(pending, [f"{manifest.iteration}\n".encode()])
    storage.sync(root)
    # 5. The checkpoint appears, 6. and is announced. Each rename is synced before the next.
    storage.rename(temporary, final)
    storage.rename(pending, root / TRACKER)


def _discard(storage: Storage, path: Path) -> None:
    try:
        storage.remove(path)
    except OSError as error:
        _warn(path, error)


def _warn(path: Path, error: OSError) -> None:
    logging.getLogger(__name__).warning("%s: could not be removed: %s", path, error.strerror)


def retire_old_checkpoints(
    root: Path, newest: int, keep_last: int | None, keep_every: int | None, storage: Storage
) -> list[Path]:
    """Rename old checkpoints and leftovers so that nobody finds them. What cannot be renamed is logged and stays.

    Called when `newest` is complete, and nothing is being written.

    Args:
        root: the directory of checkpoints.
        newest: iteration that was just saved. Later ones are left alone.
        keep_last: number of the newest whole checkpoints that stay, `newest` among them; None: all.
        keep_every: multiples of it stay too.
        storage: the disk.

    Returns:
        Directories to be deleted, under names that no save ever uses, since the deletion may last into later ones.
    """
    # Renamed at once, deleted later, so that a directory under its own name is never half there.
    older = [item for item in reversed(iteration_directories(root).items()) if item[0] < newest] if keep_last else []
    kept = 1
    for number, path in older:
        # Damaged ones neither go nor count: whole ones that a run may need stay however many of them there are.
        spare = kept >= (keep_last or 0)
        if (spare and keep_every and number % keep_every == 0) or not _is_complete(path):
            continue
        if spare:
            rename_for_deletion(path, number, root, storage)
        kept += 1
    return _leftovers(root, storage)


def _leftovers(root: Path, storage: Storage) -> list[Path]:
    """Retire what a crash left or a second save replaced, and return all retired directories.

    A directory with files that no checkpoint has is left alone, as is one whose successor is not whole.
    """
    for path in sorted(root.iterdir()):
        unfinished, directory = UNFINISHED.fullmatch(path.name), DIRECTORY.fullmatch(path.name)
        if unfinished:
            rename_for_deletion(path, int(unfinished[1]), root, storage)
        elif directory and directory[2] and not holds_other_files(path) and _is_complete(path.with_suffix("")):
            rename_for_deletion(path, int(directory[1]), root, storage)
    return sorted(path for path in root.iterdir() if DELETED.fullmatch(path.name))


def rename_for_deletion(path: Path, number: int, root: Path, storage: Storage) -> None:
    """Rename a directory so that nobody finds it and the next deletion takes it. What cannot be renamed is logged and stays.

    Args:
        path: the directory.
        number: its iteration.
        root: the directory of checkpoints.
        storage: the disk.
    """
    doomed = root / f".{directory_name(number)}.deleted"
    if doomed.exists():  # it is being deleted; the next time
        return
    try:
        storage.rename(path, doomed)
    except OSError as error:
        _warn(path, error)


def _is_complete(path: Path) -> bool:
    try:
        check_sizes(path, read_manifest(path))
    except CheckpointError:
        return False
    return True


def delete_retired(paths: list[Path], storage: Storage) -> None:
    """Delete retired directories. What cannot be deleted is logged and stays until the next time."""
    for path in paths:
        _discard(storage, path)


def prune(root: Path, newest: int, keep_last: int | None, keep_every: int | None, storage: Storage | None = None) -> None:
    """Retire old checkpoints and delete them at once.

    Args:
        root: the directory of checkpoints.
        newest: iteration that was just saved.
        keep_last: number of the newest whole checkpoints that stay; None: all.
        keep_every: multiples of it stay too.
        storage: the disk.
    """
    storage = storage or Storage()
    try:
        delete_retired(retire_old_checkpoints(root, newest, keep_last, keep_every, storage), storage)
    except OSError as error:
        _warn(root, error)
