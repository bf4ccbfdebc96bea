"""Find the checkpoint directory that a path means, and say what is there instead where it means none."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable
from pathlib import Path

from megatron.checkpoint.layout import (
    DIRECTORY,
    MANIFEST,
    NO_MANIFEST,
    TRACKER,
    CheckpointError,
    CheckpointNotFound,
    NewestCheckpoint,
    describe_iterations,
    iteration_directories,
    newest_complete,
    read_manifest,
    trial_order,
)  # fmt: skip
from megatron.files.foreign import recognize


def find_checkpoint(
    path: Path, iteration: int | None = None, tell: Callable[[str], None] = lambda line: None, *, whole: bool = True
) -> Path:
    """Return the checkpoint directory that `path` means: itself, or under it the newest whole one, or the given iteration.

    Args:
        path: a directory of checkpoints, or one iter_ directory.
        iteration: exactly this one.
        tell: is told, in a line each, what is passed over, and where the tracker and the newest iteration differ.
        whole: False: the one that is meant, damaged or not; nothing is passed over, also not a tracker that names none.

    Raises:
        CheckpointNotFound: there is none; the message names near candidates.
        CheckpointError: none is whole, as far as `newest_complete` looks. Of one that is named, as itself or by its
            iteration, only the manifest's presence is tested.
    """
    if (why := _unusable(path)) is not None:
        raise CheckpointNotFound(f"{path}: {why}")
    if (path / MANIFEST).is_file():
        if iteration is not None and (held := read_manifest(path).iteration) != iteration:
            raise CheckpointNotFound(f"{path}: it is of iteration {held}, not {iteration}")
        return path
    if iteration is not None:
        return _numbered(path, iteration)
    if DIRECTORY.fullmatch(path.name):
        raise CheckpointError(f"{path}: {NO_MANIFEST}")
    # Which one `path` means is left open only here, so only here may a damaged one be passed over for an older one.
    newest = newest_complete(path) if whole else _meant(path)
    if newest.path is None:
        if not iteration_directories(path) and not newest.skipped:
            raise CheckpointNotFound(f"{path}: no checkpoint here, there is no {TRACKER}. {describe_iterations(path)}")
        what = "no checkpoint is whole" if whole else "which checkpoint is meant is not clear"
        raise CheckpointError(f"{path}: {what}: {'; '.join(newest.skipped)}. {describe_iterations(path)}")
    for line in newest.lines:
        tell(line)
    return newest.path


def _unusable(path: Path) -> str | None:
    """Say why `path` is no directory that could hold checkpoints of this program; None where it is one."""
    if not os.path.exists(path):  # which, unlike the path's own, fails for no name
        return _absence(path)
    if not os.path.isdir(path):
        what = f"it is a file, {found}" if (found := recognize(path)) else "this is a file"
        return f"expected a directory of checkpoints, {what}"
    if not os.access(path, os.R_OK | os.X_OK):
        return "it cannot be read: permission denied"
    # Asked last, and where no checkpoint of ours lies: a directory may hold exports for other programs beside its checkpoints.
    if not _any_finished(path) and (found := recognize(path)) is not None:
        return f"it is {found}"
    return None


def _absence(path: Path) -> str:
    """Say of a path that does not exist what is near it, or what its name stands for elsewhere."""
    parent = path.parent
    names = os.listdir(parent) if os.access(parent, os.R_OK) else []
    near = difflib.get_close_matches(path.name, names, n=3)
    if os.path.isdir(parent) and not os.access(parent, os.X_OK):
        return f"it cannot be read: permission denied in {parent}"
    if not near and (found := recognize(path)) is not None:
        return f"it is {found}"
    return "there is no such directory" + (f". Near it: {', '.join(str(parent / name) for name in near)}" if near else "")


def _any_finished(path: Path) -> bool:
    return any((each / MANIFEST).is_file() for each in (path, *iteration_directories(path).values()))


def _meant(root: Path) -> NewestCheckpoint:
    order = trial_order(root)
    return NewestCheckpoint(None if order.lines or not order.paths else order.paths[0], order.lines, order.note)


def _numbered(root: Path, iteration: int) -> Path:
    present = iteration_directories(root)
    if iteration not in present:
        raise CheckpointNotFound(f"{root}: there is no iteration {iteration}. {describe_iterations(root)}")
    if not (present[iteration] / MANIFEST).is_file():
        raise CheckpointError(f"{present[iteration]}: {NO_MANIFEST}. {describe_iterations(root)}")
    return present[iteration]
