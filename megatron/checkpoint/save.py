"""Save a checkpoint atomically: every piece of every tensor is written once, and all ranks share the writing.

Each rank writes its own file into a temporary directory beside the final one. When all have succeeded, the first rank adds
the small files and the manifest, renames the directory, and finally replaces the tracker. An error on one rank is raised on
all of them.
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
        root: directory of checkpoints, on a file system that all ranks share.
        iteration: number of training iterations that the state has completed.
        parts: the parts to save, by the prefix of their tensors' names; the same prefixes on all ranks.
        mesh: the run's mesh.
        config: the run's merged configuration, as JSON values.
        assets: the tokenizer's files, as name -> bytes or as a function that returns them; only the first rank's are used.
        keep_last: number of the newest complete checkpoints to keep; None: all.
        keep_every: iterations divisible by it are kept as well.
        storage: file system operations; None: the real ones.

    Returns:
        The new directory.

    Raises:
        CheckpointError: on all ranks, when anything fails on one of them.
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
        root: directory of checkpoints, on a file system that all ranks share.
        plan: this rank's plan.
        world: the ranks that save.
        storage: file system operations.
        watch: watchdog that is told what this rank is doing.

    Returns:
        The new directory.

    Raises:
        DiskError: on all ranks, if the disk caused every failure.
        CheckpointError: on all ranks, when anything else fails on one of them.
    """
    name = directory_name(plan.iteration)
    # Beside the final directory and so on the same file system, because only there is a rename atomic.
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
    """Create an empty temporary directory, after checking that the disk has enough space. Called on the first rank only."""
    if not root.is_dir():
        storage.make_directory(root)
        storage.sync(root.parent)  # a new directory survives a power failure only once its parent is on disk
    if foreign := [path for path in iteration_directories(root).values() if holds_other_files(path)]:
        raise CheckpointError(f"{foreign[0]}: is no checkpoint of this program; take it away, or save to another directory")
    storage.remove(temporary)
    # Leftovers of earlier saves are deleted only if their space is needed: deletion can be slow, and all ranks wait here.
    free, needed = storage.free_bytes(root), plan.bytes
    if free is not None and free < needed:
        delete_retired(_retire_leftovers(root, storage), storage)
        free = storage.free_bytes(root)
    if free is not None and free < needed:
        raise DiskError(
            f"{root}: no space: the checkpoint has {needed} bytes ({needed / 1e9:.1f} GB), and {free} ({free / 1e9:.1f} GB) "
            "are free. Delete something there; with --keep-last N only the newest N checkpoints stay"
        )
    storage.make_directory(temporary)


def _write_shard(storage: Storage, path: Path, plan: SavePlan, watch: Watchdog) -> FileRecord | None:
    """Write this rank's file and return its record; None if this rank writes nothing."""
    if not plan.entries:
        return None

    def chunks() -> Iterator[bytes | memoryview]:
        written = 0
        for chunk in stream_safetensors(plan.entries, {"format": "pt"}):
            # A new phase for every chunk, which restarts the watchdog's timeout: a slow disk is not a hang.
            watch.doing(f"writing {path} after {written} bytes", alone=True)
            yield chunk
            written += len(chunk)
        watch.doing(f"waiting until {path} is on disk", alone=True)

    return storage.write(path, chunks())


def _write_small_files(storage: Storage, temporary: Path, files: Mapping[str, bytes]) -> dict[str, FileRecord]:
    records, folders = {}, set()
    for name, content in files.items():
        for folder in PurePosixPath(name).parents[:-1]:
            if folder not in folders:
                storage.make_directory(temporary / folder)
                folders.add(folder)
        records[name] = storage.write(temporary / name, [content])
    # `write` has synced the files' bytes, but not the directories that contain their names. Inner directories first.
    for folder in sorted(folders, reverse=True):
        storage.sync(temporary / folder)
    return records


def _commit(storage: Storage, root: Path, temporary: Path, final: Path, manifest: Manifest) -> None:
    """Make the temporary directory the latest checkpoint. Called on the first rank only.

    The process may die after any of the numbered steps: a complete checkpoint remains the latest one.
    """
    # 1. Check that the first rank sees every other rank's file: if not, the ranks do not share the directory.
    for name, record in manifest.files.items():
        path = temporary / name
        if not path.is_file() or path.stat().st_size != record.bytes:
            raise CheckpointError(
                f"{path}: not here as it was written. Save to a directory that all ranks share, and that no other job saves to"
            )
    # 2. Write the manifest, after all files that it lists, and sync the directory before it is renamed: an iter_ directory with
    #    a manifest is then complete, even after a power failure.
    storage.write(temporary / MANIFEST, [manifest.to_text().encode()])
    storage.sync(temporary)
    # 3. Rename an earlier save of this iteration. Under the new name it is still found until the new save is finished.
    if final.exists():
        aside = final.with_name(final.name + ".replaced")
        if aside.exists():  # possibly complete while `final` is not, so it keeps its name and `final` is deleted
            aside = root / f".{final.name}.deleted"
            storage.remove(aside)
        storage.rename(final, aside)
    # 4. Write the next tracker before the directory is renamed: if both exist, this save is the latest, even if it died before
    #    it replaced the tracker. After step 3, since until then the directory of that name is the earlier save.
    pending = root / NEXT_TRACKER
    storage.write(pending, [f"{manifest.iteration}\n".encode()])
    storage.sync(root)
    # 5. Rename the checkpoint, 6. then the tracker. `rename` syncs the directory each time.
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
    """Rename old checkpoints and leftovers of crashed saves to names that no load looks for. A failed rename is logged.

    Call this when `newest` is complete and no save is in progress.

    Args:
        root: directory of checkpoints.
        newest: iteration that was just saved. Later iterations are left alone.
        keep_last: number of the newest complete checkpoints to keep, including `newest`; None: all.
        keep_every: iterations divisible by it are kept as well.
        storage: file system operations.

    Returns:
        The renamed directories, to be deleted. No save uses their names, so the deletion may overlap with later saves.
    """
    # Renamed now and deleted later, so that a half-deleted directory never has a checkpoint's name.
    older = [item for item in reversed(iteration_directories(root).items()) if item[0] < newest] if keep_last else []
    kept = 1
    for number, path in older:
        # Damaged checkpoints are neither retired nor counted, so that they never displace a complete one.
        enough_kept = kept >= (keep_last or 0)
        if (enough_kept and keep_every and number % keep_every == 0) or not _is_complete(path):
            continue
        if enough_kept:
            rename_for_deletion(path, number, root, storage)
        kept += 1
    return _retire_leftovers(root, storage)


def _retire_leftovers(root: Path, storage: Storage) -> list[Path]:
    """Retire unfinished saves and replaced checkpoints, and return all retired directories.

    A replaced checkpoint stays if it contains files that no checkpoint has, or if its replacement is not complete.
    """
    for path in sorted(root.iterdir()):
        unfinished, directory = UNFINISHED.fullmatch(path.name), DIRECTORY.fullmatch(path.name)
        if unfinished:
            rename_for_deletion(path, int(unfinished[1]), root, storage)
        elif directory and directory[2] and not holds_other_files(path) and _is_complete(path.with_suffix("")):
            rename_for_deletion(path, int(directory[1]), root, storage)
    return sorted(path for path in root.iterdir() if DELETED.fullmatch(path.name))


def rename_for_deletion(path: Path, number: int, root: Path, storage: Storage) -> None:
    """Retire a directory: rename it so that no load finds it and the next deletion removes it. A failed rename is logged.

    Args:
        path: the directory.
        number: its iteration.
        root: directory of checkpoints.
        storage: file system operations.
    """
    retired = root / f".{directory_name(number)}.deleted"
    if retired.exists():  # an earlier directory of this iteration is still being deleted; the next call retires this one
        return
    try:
        storage.rename(path, retired)
    except OSError as error:
        _warn(path, error)


def _is_complete(path: Path) -> bool:
    try:
        check_sizes(path, read_manifest(path))
    except CheckpointError:
        return False
    return True


def delete_retired(paths: list[Path], storage: Storage) -> None:
    """Delete retired directories. A failed deletion is logged, and the directory stays until the next call."""
    for path in paths:
        _discard(storage, path)


def prune(root: Path, newest: int, keep_last: int | None, keep_every: int | None, storage: Storage | None = None) -> None:
    """Retire old checkpoints and delete them at once.

    Args:
        root: directory of checkpoints.
        newest: iteration that was just saved.
        keep_last: number of the newest complete checkpoints to keep; None: all.
        keep_every: iterations divisible by it are kept as well.
        storage: file system operations; None: the real ones.
    """
    storage = storage or Storage()
    try:
        delete_retired(retire_old_checkpoints(root, newest, keep_last, keep_every, storage), storage)
    except OSError as error:
        _warn(root, error)
