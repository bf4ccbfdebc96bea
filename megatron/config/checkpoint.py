"""Settings of checkpoints: where a run's state is kept, and where it comes from."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron.config.check import ConfigCheck, Rules, exclusive, needs
from megatron.config.directories import MANIFEST, checkpoint_entries, iterations, same_directory
from megatron.config.errors import Problem
from megatron.config.option import NOT_NEGATIVE, POSITIVE, option
from megatron.config.paths import near
from megatron.files.foreign import recognize, recognize_directory


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints that a run writes, and those that it starts from."""

    save: str | None = option(None, "directory that checkpoints go to")
    save_interval: int | None = option(None, "steps between checkpoints", legal=POSITIVE)
    save_interval_mins: float | None = option(
        None, "minutes between checkpoints, beside --save-interval or instead of it", legal=POSITIVE
    )
    async_save: bool = option(False, "write checkpoints in the background, from a copy in host memory, while training goes on")
    on_save_error: str = option(
        "stop", "a full or failing disk ends the run, or costs it that checkpoint alone", choices=("stop", "continue")
    )
    load: str | None = option(
        None,
        "directory of checkpoints to start from: SAVE of another run, or one iter_ directory; the directory of --save itself "
        "may be empty yet",
    )
    load_iteration: int | None = option(
        None, "which iteration of --load; default the latest", aliases=("--ckpt-step",), legal=NOT_NEGATIVE
    )
    exit_on_missing_checkpoint: bool = option(
        False, "an error, not a fresh start, where --load is the directory of --save and holds nothing"
    )
    auto_resume: bool = option(False, "go on from the newest complete checkpoint of --save, or start fresh and say so")
    overwrite: bool = option(
        False,
        "start a new run where --save holds checkpoints. They stay, and can be gone on with, until the new run's first "
        "checkpoint is whole; then they are removed, and nothing else: one with a file that no run wrote is refused. The old "
        "metrics.jsonl becomes metrics.1.jsonl",
    )
    allow_data_change: bool = option(False, "on resume take the training data from the command line, though they changed")
    finetune: bool = option(False, "take only the weights of --load: iteration 0, new optimizer, data from the start")
    no_load_optim: bool = option(False, "start with a new optimizer state")
    no_save_optim: bool = option(False, "leave the optimizer state out of checkpoints")
    use_checkpoint_args: bool = option(
        False, "take the model's shape, the sequence length and the tokenizer from the checkpoint, where no flag gives them"
    )
    keep_last: int | None = option(None, "how many of the newest checkpoints stay; default all", legal=POSITIVE)
    keep_every: int | None = option(None, "checkpoints at multiples of this stay for ever", legal=POSITIVE)


def starts_fresh(checkpoint: CheckpointConfig) -> bool:
    """Return whether --load names the directory of --save and nothing was saved there yet, so that this is a run's first start.

    Megatron-LM's scripts say `--save C --load C` each time. Not so where something certain is asked for: weights alone
    (--finetune), an iteration, or by --exit-on-missing-checkpoint an error.
    """
    if not same_directory(checkpoint.load, checkpoint.save) or checkpoint.exit_on_missing_checkpoint:
        return False
    root = Path(checkpoint.load or "")
    if checkpoint.finetune or checkpoint.load_iteration is not None or (os.path.exists(root) and not os.path.isdir(root)):
        return False
    try:
        return not checkpoint_entries(root)
    except OSError:
        return False


def checkpoint_companions(c: ConfigCheck) -> Iterator[Problem]:
    """Settings that mean nothing without another, and the two that say what becomes of what --save holds."""
    saving = ("auto_resume", "keep_last", "keep_every", "save_interval_mins", "async_save", "on_save_error", "overwrite")
    yield from needs(c, [f"checkpoint.{name}" for name in saving], "checkpoint.save")
    loading = ("finetune", "load_iteration", "use_checkpoint_args")
    yield from needs(c, [f"checkpoint.{name}" for name in loading], "checkpoint.load")
    yield from exclusive(c, "checkpoint.auto_resume", "checkpoint.overwrite")


def saving(c: ConfigCheck) -> Iterator[Problem]:
    """A run says how often it saves."""
    intervals = ("checkpoint.save_interval", "checkpoint.save_interval_mins")
    if c.is_set("checkpoint.save") and all(c[name] is None and name not in c.invalid for name in intervals):
        yield Problem(c.flag_text("checkpoint.save"), "needs `--save-interval` or `--save-interval-mins`")


def load(c: ConfigCheck) -> Iterator[Problem]:
    """--load, or --pretrained-checkpoint, names a directory with a checkpoint in it, and the wanted iteration is there.

    Which one is taken where none is wanted, and whether it is whole, is found out later (train/resume.py).
    """
    if c["checkpoint.load"] is None or first_start(c):
        return
    root, wanted = Path(c["checkpoint.load"]), c["checkpoint.load_iteration"]
    pretrained = c["task.pretrained_checkpoint"] == c["checkpoint.load"]
    what = c.flag_text("task.pretrained_checkpoint" if pretrained else "checkpoint.load")
    fresh = "; leave out --load to start from new weights, or use --auto-resume to go on from --save where there is something"
    if c["task.task"] is not None:
        fresh = ""  # a task asks a model that is there, or teaches it
    if not os.path.isdir(root):
        yield Problem(what, _no_directory(root, fresh))
        return
    try:
        empty, present = next(os.scandir(root), None) is None, iterations(root)
        other = None if os.path.exists(root / MANIFEST) or first_finished(root) else recognize_directory(root)
    except OSError as error:
        yield Problem(what, f"cannot be read: {error.strerror}")
        return
    if empty:
        yield Problem(what, "is an empty directory" + fresh)
    elif other is not None:
        yield Problem(what, f"is {other}")
    elif os.path.exists(root / MANIFEST):  # one checkpoint itself
        own = re.fullmatch(r"iter_(\d+)", root.resolve().name)
        if own and wanted is not None and wanted != int(own[1]):
            yield Problem(f"{what} and {c.flag_text('checkpoint.load_iteration')}", "name different iterations")
    else:
        yield from _missing_iteration(c, what, root, present, fresh)


def _missing_iteration(c: ConfigCheck, what: str, root: Path, present: list[int], fresh: str) -> Iterator[Problem]:
    """Yield a problem where a directory of checkpoints has none, or not the wanted one.

    Args:
        c: the configuration.
        what: the setting that names the directory, in words.
        root: the directory.
        present: iterations in it, whole or not.
        fresh: words that help where there is nothing to load.
    """
    wanted = c["checkpoint.load_iteration"]
    finished = [number for number in present if os.path.exists(root / f"iter_{number:07d}" / MANIFEST)]
    if wanted is not None and wanted not in present:
        listed = ", ".join(map(str, present[-8:])) or "none"
        yield Problem(c.flag_text("checkpoint.load_iteration"), f"is not in {root}", listed)
    elif not present:
        yield Problem(what, f"holds no checkpoint: neither {MANIFEST} nor an iter_ directory" + fresh)
    elif wanted is not None and wanted not in finished:
        missing = root / f"iter_{wanted:07d}" / MANIFEST
        legal = ", ".join(map(str, finished[-8:])) or "none"
        yield Problem(what, f"is not finished: {missing} does not exist; choose another with --load-iteration", legal)
    elif not finished:
        yield Problem(what, f"holds no finished checkpoint: none of its iter_ directories has a {MANIFEST}" + fresh)


def _no_directory(root: Path, fresh: str) -> str:
    """Yield the problem of a --load that is no directory; the words of `fresh` help where nothing else does."""
    nearby = "" if os.path.lexists(root) else near(root)
    found = None if nearby.startswith("; near it") else recognize(root)
    if os.path.exists(root):
        return f"is a file, {found}" if found else f"is a file; a checkpoint is a directory{fresh}"
    if os.path.islink(root):
        return f"is a link to {os.readlink(root)}, which does not exist{fresh}"
    return f"is {found}" if found else f"does not exist{nearby}{fresh}"


def first_finished(root: Path) -> bool:
    """Return whether one of the checkpoints in a directory is finished."""
    return any(os.path.exists(root / f"iter_{number:07d}" / MANIFEST) for number in iterations(root))


def first_start(c: ConfigCheck) -> bool:
    """Return whether --load is allowed to name nothing yet. An evaluation, or a task, would have random weights."""
    return starts_fresh(c.resolved.checkpoint) and not c["eval.skip_train"] and c["task.task"] is None


def remarks(c: ConfigCheck) -> Iterator[str]:
    """Yield what was said of saving and has no effect."""
    if c.raw.checkpoint.save_interval is not None and c.raw.checkpoint.save is None:
        yield "--save-interval changes nothing: nothing is saved without --save"


RULES = Rules(every_run=(checkpoint_companions,), pretraining=(saving,), disk=(load,), remarks=(remarks,))
