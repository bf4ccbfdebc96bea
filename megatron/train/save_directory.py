"""Decide what a run may do with a --save that holds checkpoints already: resume from them, overwrite them, or refuse.

Content of --save       command                          result
no checkpoint           any                              it begins, or goes on from --load
a checkpoint itself     any                              refused: --save is the directory around it
checkpoints             --skip-train                     nothing is written there but lines of metrics, and no lock is taken
                        --auto-resume                    goes on from the newest whole one
                        --load of one of them            goes on from it; a note where later ones are left behind
                        --load of one, --finetune        refused: it would begin anew over them
                        --load from elsewhere            goes on from it; a note, and when the run starts the other's are
                                                         set aside, whole, in a directory set_aside_1 in --save: neither
                                                         is written over, deleted or gone on with in place of the other
                        --pretrained-checkpoint          refused: fine-tuning would begin anew over them
                        no --load                        refused: it would begin anew over them
                        --overwrite                      begins anew; they go when its first checkpoint is whole
                        --overwrite, --load of one       refused, but for --finetune: it cannot go on and begin anew
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

ELSEWHERE = "another --save keeps both"


def check_save(source: StateSource, config: RunConfig) -> list[str]:
    """Check that the run may write to --save, and return lines for the user about the checkpoints there.

    Raises:
        ConfigError: the run may not write there; see the table at the top of this file.
    """
    checkpoint, root = config.checkpoint, Path(config.checkpoint.save or ".")
    if checkpoint.save is None or config.eval.skip_train:
        return []
    found = checkpoint_entries(root)
    if MANIFEST in found:
        rule, legal = "is one checkpoint, not a directory of them", str(root.parent)
        raise ConfigError([Problem(flag_text("checkpoint.save", checkpoint.save), rule, legal)])
    if not found:
        return []
    if (why := _refusal(source, config, found)) is not None:
        rule, legal = why
        raise ConfigError([Problem(flag_text("checkpoint.save", checkpoint.save), rule, legal)])
    if checkpoint.overwrite:
        return _announce_overwrite(root)
    if starts_beside_another_run(source, config):
        held = (
            _format_iterations(list(iteration_directories(root)))
            if iteration_directories(root)
            else "the traces of checkpoints"
        )
        instead = "--auto-resume would go on with them instead"
        where = f"{root} holds {held}, of another run than --load {checkpoint.load}"
        return [f"note: {where}: {instead}. {_announce_set_aside(root)}"]
    later = [number for number in iteration_directories(root) if number > source.state.iteration]
    if not checkpoint.auto_resume and _names_one(checkpoint) and later:
        held = _format_iterations(later)
        return [f"going back to iteration {source.state.iteration}: {held} in {root} stay until this run comes there"]
    return []


def starts_beside_another_run(source: StateSource, config: RunConfig) -> bool:
    """Return whether a run writes to --save but starts from a checkpoint elsewhere, so that files in --save are another run's.

    The answer is the same on all ranks, since it depends on the command and not on the files.
    """
    checkpoint = config.checkpoint
    if checkpoint.save is None or config.eval.skip_train or checkpoint.auto_resume or checkpoint.overwrite:
        return False
    return source.directory is not None and not _is_in_save(source.directory, checkpoint.save)


def _refusal(source: StateSource, config: RunConfig, found: list[str]) -> tuple[str, str] | None:
    """Return why the table above refuses the command, and the alternatives; None if the run may write to --save."""
    checkpoint, pretrained = config.checkpoint, config.task.pretrained_checkpoint
    inside = source.directory is not None and _is_in_save(source.directory, checkpoint.save or ".")
    anew = "--overwrite begins anew over them"
    on = "--auto-resume goes on with them"
    held = f"holds checkpoints already ({', '.join(found[:3])}{', ...' if len(found) > 3 else ''})"
    goes_on = inside and not checkpoint.finetune
    if checkpoint.auto_resume:
        return None
    if checkpoint.overwrite:
        rule = f"{held}, and --load goes on with one of them, while --overwrite begins anew over them"
        return (rule, f"leave out --overwrite; or --finetune takes the weights alone; {ELSEWHERE}") if goes_on else None
    if checkpoint.load is None:
        return f"{held}, and this run would begin anew over them", f"{on}; {anew}; {ELSEWHERE}"
    if inside and checkpoint.finetune:
        rule = f"{held}, and --finetune would begin anew over them, the one that it loads among them"
        return rule, f"{on}, or --load without --finetune; {anew}; {ELSEWHERE}"
    if not inside and pretrained is not None:
        rule = f"{held}, and fine-tuning from --pretrained-checkpoint {pretrained} would begin anew over them"
        return rule, f"{on}; {anew}; {ELSEWHERE}"
    return None


def _is_in_save(directory: Path, save: str) -> bool:
    """Return whether a checkpoint lies in --save, directly or through links."""
    return any(same_directory(str(each.parent), save) for each in (directory, directory.resolve()))


def _names_one(checkpoint: CheckpointConfig) -> bool:
    """Return whether --load asks for one checkpoint of several."""
    load = checkpoint.load
    return load is not None and (checkpoint.load_iteration is not None or bool(DIRECTORY.fullmatch(Path(load).resolve().name)))


def _format_iterations(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:8]))
    return f"the checkpoints of iterations {shown}{', ...' if len(numbers) > 8 else ''}"


def _announce_overwrite(root: Path) -> list[str]:
    """Return the line that announces --overwrite. ConfigError if --save holds anything that this program did not write."""
    for path in iteration_directories(root).values():
        if foreign := _describe_foreign(path):
            rule = f"cannot be written over with --overwrite: {foreign}"
            raise ConfigError([Problem(flag_text("checkpoint.save", str(root)), rule, "move it away, or another --save")])
    numbers = list(iteration_directories(root))
    listed = _format_iterations(numbers) if numbers else "the traces of checkpoints"
    return [f"--overwrite: {listed} in {root} stay until this run's first one is whole, and are removed then"]


def _describe_foreign(directory: Path) -> str | None:
    """Return a description of what in a directory this program did not write; None for a checkpoint and nothing else."""
    try:
        files = {*read_manifest(directory).files, MANIFEST}
    except CheckpointError as error:
        return f"{error}"
    if directory.is_symlink():
        return f"{directory} is a link"
    # A directory is deleted only if its manifest names every file in it.
    for folder, _, names in os.walk(directory):
        for name in names:
            if (path := Path(folder, name)).relative_to(directory).as_posix() not in files:
                return f"{path} is no part of a checkpoint"
    return None


@dataclass(frozen=True)
class _Directory:
    """A directory that was there at the start of the run, known by its inode: another one may get its name later."""

    path: Path
    device: int
    inode: int

    def still_there(self) -> bool:
        try:
            about = os.lstat(self.path)
        except OSError:
            return False
        return (about.st_dev, about.st_ino) == (self.device, self.inode)


class CheckpointsToReplace:
    """The checkpoints that a run with --overwrite found in --save. Made by its first rank before anything is saved."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._old: dict[int, _Directory] = {}
        for number, path in iteration_directories(root).items():
            about = os.lstat(path)
            self._old[number] = _Directory(path, about.st_dev, about.st_ino)

    def put_aside(self, storage: Storage) -> None:
        """Rename them, so that the saver deletes them. Call this after the new run has committed its first checkpoint."""
        # Checked again, since a user may have moved one away, or put a file into it, since the start.
        for number, directory in list(self._old.items()):
            if directory.still_there() and _describe_foreign(directory.path) is None:
                rename_for_deletion(directory.path, number, self._root, storage)
            if not directory.still_there():
                del self._old[number]


def set_run_aside(root: Path, metrics: str | None) -> str | None:
    """Move all checkpoints of another run in --save into a new directory there, which programs can use as a --load.

    Called by the first rank before anything is saved, so that the two runs' checkpoints never lie beside each other.

    Args:
        root: the directory of --save.
        metrics: the metrics file that this run will append to; the old file is moved too if it lies in `root`.

    Returns:
        A line that says where they are now; None if there is nothing to move.

    Raises:
        OSError: when the disk refuses.
    """
    if not checkpoint_entries(root):
        return None
    numbers, aside = list(iteration_directories(root)), _next_aside(root)
    aside.mkdir()
    # The tracker first: if the move is interrupted, it must not announce a checkpoint that has been moved.
    names = [NEXT_TRACKER, TRACKER, PROGRESS, *(name for name in sorted(os.listdir(root)) if DIRECTORY.fullmatch(name))]
    if metrics is not None and same_directory(str(Path(metrics).absolute().parent), str(root)):
        names.append(Path(metrics).name)
    for name in names:
        if os.path.lexists(root / name):
            _move(root / name, aside / name)
    held = _format_iterations(numbers) if numbers else "the traces of checkpoints"
    return f"{held} of another run are in {aside} now: --load {aside} goes on with them"


def _move(path: Path, aside: Path) -> None:
    """Move a file or directory one level down; a relative link is rewritten, so that it keeps its target."""
    if path.is_symlink() and not os.path.isabs(target := os.readlink(path)):
        aside.symlink_to(Path("..", target))
        path.unlink()
    else:
        path.rename(aside)


def _next_aside(root: Path) -> Path:
    numbers = [int(found[1]) for name in os.listdir(root) if (found := re.fullmatch(r"set_aside_(\d{1,9})", name))]
    return root / f"set_aside_{max(numbers, default=0) + 1}"


def _announce_set_aside(root: Path) -> str:
    return f"When this run starts they are set aside, in {_next_aside(root)}; another --save leaves them where they are"


def set_metrics_aside(path: Path, save: str | None) -> str | None:
    """Rename the metrics file of the run that --overwrite replaces.

    Returns:
        A line with the new name; None if there is nothing to rename.
    """
    # A metrics file outside of --save is the user's choice: it is appended to.
    if not path.exists() or not same_directory(str(path.parent), save):
        return None
    number = 1  # incremented to the first name that is free
    while (aside := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
        number += 1
    path.rename(aside)
    return f"--overwrite: {path.name} of the run before is {aside.name} now"
