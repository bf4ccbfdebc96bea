"""Decide what a run may do with a --save in which checkpoints lie already: go on with them, write over them, or nothing.

What lies in --save     the command                      what happens
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

from megatron.checkpoint.layout import DIRECTORY, MANIFEST, NEXT_TRACKER, TRACKER, CheckpointError, iterations, read_manifest
from megatron.checkpoint.save import put_aside
from megatron.checkpoint.storage import Storage
from megatron.config.directories import checkpoint_entries, same_directory
from megatron.config.errors import ConfigError, Problem
from megatron.config.options import flag_text
from megatron.config.schema import CheckpointConfig, RunConfig
from megatron.train.progress import PROGRESS_FILE as PROGRESS
from megatron.train.source import StateSource

ELSEWHERE = "another --save keeps both"


def check_save(source: StateSource, config: RunConfig) -> list[str]:
    """Return the lines that tell the user of the contents of --save.

    Raises:
        ConfigError: the run may not write there; see the table above.
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
        return _overwriting(root)
    if starts_beside_another_run(source, config):
        held = _listed(list(iterations(root))) if iterations(root) else "the traces of checkpoints"
        instead = "--auto-resume would go on with them instead"
        return [f"note: {root} holds {held}, of another run than --load {checkpoint.load}: {instead}. {_going_aside(root)}"]
    later = [number for number in iterations(root) if number > source.state.iteration]
    if not checkpoint.auto_resume and _names_one(checkpoint) and later:
        return [f"going back to iteration {source.state.iteration}: {_listed(later)} in {root} stay until this run comes there"]
    return []


def starts_beside_another_run(source: StateSource, config: RunConfig) -> bool:
    """Return whether a run writes to --save and begins from a checkpoint elsewhere, so that what lies there is another's.

    The same on all ranks: it follows from what they were told, not from what they see.
    """
    checkpoint = config.checkpoint
    if checkpoint.save is None or config.eval.skip_train or checkpoint.auto_resume or checkpoint.overwrite:
        return False
    return source.directory is not None and not _inside(source.directory, checkpoint.save)


def _refusal(source: StateSource, config: RunConfig, found: list[str]) -> tuple[str, str] | None:
    """Look the command up in the table above: what is wrong and the ways out; None where the run may go on."""
    checkpoint, pretrained = config.checkpoint, config.task.pretrained_checkpoint
    inside = source.directory is not None and _inside(source.directory, checkpoint.save or ".")
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


def _inside(directory: Path, save: str) -> bool:
    """Return whether a checkpoint is one of --save's, however links lead to it."""
    return any(same_directory(str(each.parent), save) for each in (directory, directory.resolve()))


def _names_one(checkpoint: CheckpointConfig) -> bool:
    """Return whether --load asks for one checkpoint of several."""
    load = checkpoint.load
    return load is not None and (checkpoint.load_iteration is not None or bool(DIRECTORY.fullmatch(Path(load).resolve().name)))


def _listed(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:8]))
    return f"the checkpoints of iterations {shown}{', ...' if len(numbers) > 8 else ''}"


def _overwriting(root: Path) -> list[str]:
    """Return the line that announces --overwrite. ConfigError for what no run of this program wrote."""
    for path in iterations(root).values():
        if strange := _strange(path):
            rule = f"cannot be written over with --overwrite: {strange}"
            raise ConfigError([Problem(flag_text("checkpoint.save", str(root)), rule, "move it away, or another --save")])
    numbers = list(iterations(root))
    listed = _listed(numbers) if numbers else "the traces of checkpoints"
    return [f"--overwrite: {listed} in {root} stay until this run's first one is whole, and are removed then"]


def _strange(directory: Path) -> str | None:
    """Return what in a directory no save wrote, in words; None for a checkpoint of this program."""
    try:
        files = {*read_manifest(directory).files, MANIFEST}
    except CheckpointError as error:
        return f"{error}"
    if directory.is_symlink():
        return f"{directory} is a link"
    # Every file must stand in the manifest: a directory with anything else in it is not deleted.
    for folder, _, names in os.walk(directory):
        for name in names:
            if (path := Path(folder, name)).relative_to(directory).as_posix() not in files:
                return f"{path} is no part of a checkpoint"
    return None


@dataclass(frozen=True)
class _Directory:
    """A directory that was there at the start of the run: its name may be another's later, its inode is not."""

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
        for number, path in iterations(root).items():
            about = os.lstat(path)
            self._old[number] = _Directory(path, about.st_dev, about.st_ino)

    def put_aside(self, storage: Storage) -> None:
        """Give them names under which the saver deletes them. To be called when a checkpoint of the new run is whole."""
        # Judged again: a user may have moved one away, or put something into it, since the start.
        for number, directory in list(self._old.items()):
            if directory.still_there() and _strange(directory.path) is None:
                put_aside(directory.path, number, self._root, storage)
            if not directory.still_there():
                del self._old[number]


def set_run_aside(root: Path, metrics: str | None) -> str | None:
    """Move all checkpoints of another run in --save into a directory beside them, in which any program finds them whole.

    Made by the first rank before anything is saved, so a run that dies early finds nothing here that is not its own.

    Args:
        root: --save.
        metrics: the file of metrics that this run will append to; it goes along if it lies in `root`.

    Returns:
        A line that says where they are; None where there is nothing to move.

    Raises:
        OSError: where the disk refuses.
    """
    if not checkpoint_entries(root):
        return None
    numbers, aside = list(iterations(root)), _next_aside(root)
    aside.mkdir()
    # The tracker first: what is not moved yet would otherwise be announced by it.
    names = [NEXT_TRACKER, TRACKER, PROGRESS, *(name for name in sorted(os.listdir(root)) if DIRECTORY.fullmatch(name))]
    if metrics is not None and same_directory(str(Path(metrics).absolute().parent), str(root)):
        names.append(Path(metrics).name)
    for name in names:
        if os.path.lexists(root / name):
            _move(root / name, aside / name)
    held = _listed(numbers) if numbers else "the traces of checkpoints"
    return f"{held} of another run are in {aside} now: --load {aside} goes on with them"


def _move(path: Path, aside: Path) -> None:
    """Rename into a directory beside; a relative link still leads where it did."""
    if path.is_symlink() and not os.path.isabs(target := os.readlink(path)):
        aside.symlink_to(Path("..", target))
        path.unlink()
    else:
        path.rename(aside)


def _next_aside(root: Path) -> Path:
    numbers = [int(found[1]) for name in os.listdir(root) if (found := re.fullmatch(r"set_aside_(\d{1,9})", name))]
    return root / f"set_aside_{max(numbers, default=0) + 1}"


def _going_aside(root: Path) -> str:
    return f"When this run starts they are set aside, in {_next_aside(root)}; another --save leaves them where they are"


def set_metrics_aside(path: Path, save: str | None) -> str | None:
    """Rename the metrics file of the run that is written over.

    Returns:
        A line that says the new name; None where there is nothing to rename.
    """
    if not path.exists() or not same_directory(str(path.parent), save):  # a file of the user's choice is appended to
        return None
    number = 1  # the first name that is free
    while (aside := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
        number += 1
    path.rename(aside)
    return f"--overwrite: {path.name} of the run before is {aside.name} now"
