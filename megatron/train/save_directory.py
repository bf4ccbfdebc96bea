"""Decide what a run may do if --save contains checkpoints already: resume from them, overwrite them, or refuse to start.

Content of --save       command                          result
no checkpoint           any                              starts, or resumes from --load
a checkpoint itself     any                              refused: --save must be its parent directory
checkpoints             --skip-train                     only metrics are written there, and no lock is taken
                        --auto-resume                    resumes from the newest complete one
                        --load of one of them            resumes from it; prints a note if there are later ones
                        --load of one, --finetune        refused: a new run would overwrite them
                        --load from elsewhere            resumes from it; prints a note, and at its start moves the
                                                         other run's checkpoints into a directory set_aside_1 in --save,
                                                         so that neither run overwrites, deletes or resumes the other's
                        --pretrained-checkpoint          refused: fine-tuning would overwrite them
                        no --load                        refused: a new run would overwrite them
                        --overwrite                      starts a new run; they are deleted after its first checkpoint
                        --overwrite, --load of one       refused without --finetune: one cannot both resume and overwrite
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from megatron.checkpoint.layout import (
    DIRECTORY,
    MANIFEST,
    NEXT_TRACKER,
    TRACKER,
    CheckpointError,
    iteration_directories,
    read_manifest,
)
from megatron.checkpoint.save import rename_for_deletion
from megatron.checkpoint.storage import Storage
from megatron.config.directories import checkpoint_entries, same_directory
from megatron.config.errors import ConfigError, Problem
from megatron.config.options import flag_text
from megatron.config.schema import CheckpointConfig, RunConfig
from megatron.train.progress import PROGRESS_FILE as PROGRESS
from megatron.train.source import StateSource

OTHER_SAVE = "another --save keeps both"


def check_save(source: StateSource, config: RunConfig) -> list[str]:
    """Check that the run may write to --save, and return lines for the user about the checkpoints in it.

    Raises:
        ConfigError: the run may not write there; see the table at the top of this file.
    """
    checkpoint, root = config.checkpoint, Path(config.checkpoint.save or ".")
    if checkpoint.save is None or config.eval.skip_train:
        return []
    entries = checkpoint_entries(root)
    if MANIFEST in entries:
        rule, legal = "is one checkpoint, not a directory of them", str(root.parent)
        raise ConfigError([Problem(flag_text("checkpoint.save", checkpoint.save), rule, legal)])
    if not entries:
        return []
    if (refusal := _refusal(source, config, entries)) is not None:
        rule, legal = refusal
        raise ConfigError([Problem(flag_text("checkpoint.save", checkpoint.save), rule, legal)])
    if checkpoint.overwrite:
        return _announce_overwrite(root)
    if starts_beside_another_run(source, config):
        content = _format_iterations(list(iteration_directories(root)))
        note = f"note: {root} contains {content} of another run than --load {checkpoint.load}"
        return [f"{note}: --auto-resume would resume that run instead. {_announce_set_aside(root)}"]
    later = [number for number in iteration_directories(root) if number > source.state.iteration]
    if not checkpoint.auto_resume and _names_one(checkpoint) and later:
        content = _format_iterations(later)
        return [f"going back to iteration {source.state.iteration}: {content} in {root} stay until this run replaces them"]
    return []


def starts_beside_another_run(source: StateSource, config: RunConfig) -> bool:
    """Return whether a run saves to --save but starts from a checkpoint elsewhere, so that the files in --save are not its own.

    The answer is the same on all ranks, since it depends on the command and not on the files.
    """
    checkpoint = config.checkpoint
    if checkpoint.save is None or config.eval.skip_train or checkpoint.auto_resume or checkpoint.overwrite:
        return False
    return source.directory is not None and not _is_in_save(source.directory, checkpoint.save)


def _refusal(source: StateSource, config: RunConfig, entries: list[str]) -> tuple[str, str] | None:
    """Return why the table above refuses the command, and the alternatives; None if it is not refused."""
    checkpoint, pretrained = config.checkpoint, config.task.pretrained_checkpoint
    from_save = source.directory is not None and _is_in_save(source.directory, checkpoint.save or ".")
    overwrite = "--overwrite replaces them by a new run"
    resume = "--auto-resume resumes from them"
    content = f"contains checkpoints already ({', '.join(entries[:3])}{', ...' if len(entries) > 3 else ''})"
    resumes = from_save and not checkpoint.finetune
    if checkpoint.auto_resume:
        return None
    if checkpoint.overwrite:
        rule = f"{content}, and --load resumes from one of them, while --overwrite replaces them by a new run"
        return (rule, f"leave out --overwrite; or --finetune loads only the weights; {OTHER_SAVE}") if resumes else None
    if checkpoint.load is None:
        return f"{content}, and this new run would overwrite them", f"{resume}; {overwrite}; {OTHER_SAVE}"
    if from_save and checkpoint.finetune:
        rule = f"{content}, and --finetune would overwrite them, including the one that it loads"
        return rule, f"{resume}, or --load without --finetune; {overwrite}; {OTHER_SAVE}"
    if not from_save and pretrained is not None:
        rule = f"{content}, and fine-tuning from --pretrained-checkpoint {pretrained} would overwrite them"
        return rule, f"{resume}; {overwrite}; {OTHER_SAVE}"
    return None


def _is_in_save(directory: Path, save: str) -> bool:
    """Return whether a checkpoint is in --save, directly or through symlinks."""
    return any(same_directory(str(each.parent), save) for each in (directory, directory.resolve()))


def _names_one(checkpoint: CheckpointConfig) -> bool:
    """Return whether --load names a checkpoint, rather than a directory of checkpoints."""
    load = checkpoint.load
    return load is not None and (checkpoint.load_iteration is not None or bool(DIRECTORY.fullmatch(Path(load).resolve().name)))


def _format_iterations(numbers: list[int]) -> str:
    """Return a phrase for the checkpoints of a directory, which may have only a tracker file left."""
    if not numbers:
        return "the remains of checkpoints"
    shown = ", ".join(map(str, numbers[:8]))
    return f"the checkpoints of iterations {shown}{', ...' if len(numbers) > 8 else ''}"


def _announce_overwrite(root: Path) -> list[str]:
    """Return the line that announces --overwrite. ConfigError if a checkpoint contains foreign files."""
    for path in iteration_directories(root).values():
        if foreign := _describe_foreign(path):
            rule = f"cannot be replaced with --overwrite: {foreign}"
            raise ConfigError([Problem(flag_text("checkpoint.save", str(root)), rule, "move it away, or another --save")])
    content = _format_iterations(list(iteration_directories(root)))
    return [f"--overwrite: {content} in {root} stay until this run's first one is complete, and are removed then"]


def _describe_foreign(directory: Path) -> str | None:
    """Return why a directory cannot be deleted safely; None for a complete checkpoint without any other file."""
    try:
        files = {*read_manifest(directory).files, MANIFEST}
    except CheckpointError as error:
        return f"{error}"
    if directory.is_symlink():
        return f"{directory} is a symlink"
    # A directory is deleted only if its manifest names every file in it.
    for folder, _, names in os.walk(directory):
        for name in names:
            if (path := Path(folder, name)).relative_to(directory).as_posix() not in files:
                return f"{path} is not part of a checkpoint"
    return None


@dataclass(frozen=True)
class _Directory:
    """A directory found at the start of the run, with its inode, since another one may get its name later."""

    path: Path
    device: int
    inode: int

    def exists(self) -> bool:
        """Return whether the path still names this directory."""
        try:
            status = os.lstat(self.path)
        except OSError:
            return False
        return (status.st_dev, status.st_ino) == (self.device, self.inode)


class CheckpointsToReplace:
    """The checkpoints that a run with --overwrite finds in --save. Created by its first rank before anything is saved."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._old: dict[int, _Directory] = {}
        for number, path in iteration_directories(root).items():
            status = os.lstat(path)
            self._old[number] = _Directory(path, status.st_dev, status.st_ino)

    def put_aside(self, storage: Storage) -> None:
        """Rename the checkpoints, so that the saver deletes them. Call this after each commit of a new checkpoint."""
        # Checked again: since the start, a user may have moved a checkpoint away, or put a file into it.
        for number, directory in list(self._old.items()):
            if directory.exists() and _describe_foreign(directory.path) is None:
                rename_for_deletion(directory.path, number, self._root, storage)
            if not directory.exists():
                del self._old[number]


def set_run_aside(root: Path, metrics: str | None) -> str | None:
    """Move all checkpoints of another run in --save into a new subdirectory, which can be given to --load.

    Called by the first rank before anything is saved, so that the checkpoints of two runs are never in one directory.

    Args:
        root: the directory of --save.
        metrics: the metrics file that this run will append to; an existing file is moved too if it is in `root`.

    Returns:
        A line for the user with their new place; None if there is nothing to move.

    Raises:
        OSError: a file cannot be moved.
    """
    if not checkpoint_entries(root):
        return None
    numbers, aside = list(iteration_directories(root)), _next_aside(root)
    aside.mkdir()
    # The tracker first: if the move is interrupted, it must not name a checkpoint that has been moved.
    names = [NEXT_TRACKER, TRACKER, PROGRESS, *(name for name in sorted(os.listdir(root)) if DIRECTORY.fullmatch(name))]
    if metrics is not None and same_directory(str(Path(metrics).absolute().parent), str(root)):
        names.append(Path(metrics).name)
    for name in names:
        if os.path.lexists(root / name):
            _move(root / name, aside / name)
    return f"{_format_iterations(numbers)} of another run are in {aside} now: --load {aside} resumes that run"


def _move(path: Path, aside: Path) -> None:
    """Move a file or directory one level down. A relative symlink is rewritten, so that its target stays the same."""
    if path.is_symlink() and not os.path.isabs(target := os.readlink(path)):
        aside.symlink_to(Path("..", target))
        path.unlink()
    else:
        path.rename(aside)


def _next_aside(root: Path) -> Path:
    """Return the first set_aside_ directory that does not exist and has no later one."""
    numbers = [int(found[1]) for name in os.listdir(root) if (found := re.fullmatch(r"set_aside_(\d{1,9})", name))]
    return root / f"set_aside_{max(numbers, default=0) + 1}"


def _announce_set_aside(root: Path) -> str:
    return f"When this run starts, they are moved into {_next_aside(root)}; another --save leaves them where they are"


def set_metrics_aside(path: Path, save: str | None) -> str | None:
    """Rename the metrics file of the run that --overwrite replaces.

    Returns:
        A line with the new name; None if there is nothing to rename.
    """
    # A metrics file outside of --save was chosen by the user, and is appended to.
    if not path.exists() or not same_directory(str(path.parent), save):
        return None
    number = 1  # of the first name that is free
    while (aside := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
        number += 1
    path.rename(aside)
    return f"--overwrite: {path.name} of the previous run is {aside.name} now"
