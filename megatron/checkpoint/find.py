"""Find the checkpoint directory that a path refers to, or describe what the path contains instead."""

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
    path: Path, iteration: int | None = None, report: Callable[[str], None] = lambda line: None, *, skip_damaged: bool = True
) -> Path:
    """Return the checkpoint directory that `path` refers to: `path` itself, or one of the checkpoints in it.

    Args:
        path: a directory of checkpoints, or one iter_ directory.
        iteration: the iteration to return; None: the first complete checkpoint in the order of `trial_order`.
        report: called with a line for each skipped checkpoint, and with one if the tracker differs from the newest iteration.
        skip_damaged: False: return the first checkpoint in that order even if it is damaged; fail if the tracker is unusable.

    Raises:
        CheckpointNotFound: there is no such checkpoint. The message lists similar paths or the iterations that exist.
        CheckpointError: no checkpoint passes the checks of `newest_complete`. A checkpoint given by its own path or by its
            iteration is not checked, except that its manifest must exist.
    """
    if (why := _why_unusable(path)) is not None:
        raise CheckpointNotFound(f"{path}: {why}")
    if (path / MANIFEST).is_file():
        if iteration is not None and (saved_iteration := read_manifest(path).iteration) != iteration:
            raise CheckpointNotFound(f"{path}: it is of iteration {saved_iteration}, not {iteration}")
        return path
    if iteration is not None:
        return _find_iteration(path, iteration)
    if DIRECTORY.fullmatch(path.name):
        raise CheckpointError(f"{path}: {NO_MANIFEST}")
    # Only here is the choice of the checkpoint left to us, so only here may a damaged one be skipped for an older one.
    newest = newest_complete(path) if skip_damaged else _first_in_trial_order(path)
    if newest.path is None:
        if not iteration_directories(path) and not newest.skipped:
            raise CheckpointNotFound(f"{path}: no checkpoint here, there is no {TRACKER}. {describe_iterations(path)}")
        problem = "no checkpoint is complete" if skip_damaged else "the tracker names no existing checkpoint"
        raise CheckpointError(f"{path}: {problem}: {'; '.join(newest.skipped)}. {describe_iterations(path)}")
    for line in newest.lines:
        report(line)
    return newest.path


def _why_unusable(path: Path) -> str | None:
    """Explain why `path` cannot be a checkpoint or a directory of checkpoints of this program; None if it can be."""
    if not os.path.exists(path):  # Path.exists would raise for an invalid name, such as one that is too long
        return _describe_missing(path)
    if not os.path.isdir(path):
        what = f"it is a file, {found}" if (found := recognize(path)) else "this is a file"
        return f"expected a directory of checkpoints, {what}"
    if not os.access(path, os.R_OK | os.X_OK):
        return "it cannot be read: permission denied"
    # Only if there is no checkpoint of ours: a directory may contain exports for other programs beside its checkpoints.
    if not _has_manifest(path) and (found := recognize(path)) is not None:
        return f"it is {found}"
    return None


def _describe_missing(path: Path) -> str:
    """Describe a path that does not exist: similar names beside it, or the other program's name that it looks like."""
    parent = path.parent
    names = os.listdir(parent) if os.access(parent, os.R_OK) else []
    near = difflib.get_close_matches(path.name, names, n=3)
    if os.path.isdir(parent) and not os.access(parent, os.X_OK):
        return f"it cannot be read: permission denied in {parent}"
    if not near and (found := recognize(path)) is not None:
        return f"it is {found}"
    return "there is no such directory" + (f". Near it: {', '.join(str(parent / name) for name in near)}" if near else "")


def _has_manifest(path: Path) -> bool:
    return any((directory / MANIFEST).is_file() for directory in (path, *iteration_directories(path).values()))


def _first_in_trial_order(root: Path) -> NewestCheckpoint:
    order = trial_order(root)
    return NewestCheckpoint(None if order.lines or not order.paths else order.paths[0], order.lines, order.note)


def _find_iteration(root: Path, iteration: int) -> Path:
    present = iteration_directories(root)
    if iteration not in present:
        raise CheckpointNotFound(f"{root}: there is no iteration {iteration}. {describe_iterations(root)}")
    if not (present[iteration] / MANIFEST).is_file():
        raise CheckpointError(f"{present[iteration]}: {NO_MANIFEST}. {describe_iterations(root)}")
    return present[iteration]
