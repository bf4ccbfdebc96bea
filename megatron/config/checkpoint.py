"""Settings of checkpoints: when and where a run saves its state, and which checkpoint it starts from."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron.config.check import ConfigCheck, Rules, exclusive, needs
from megatron.config.directories import MANIFEST, checkpoint_entries, list_iterations, same_directory
from megatron.config.errors import Problem
from megatron.config.option import NOT_NEGATIVE, POSITIVE, option
from megatron.config.paths import suggest_paths
from megatron.files.foreign import recognize, recognize_directory


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints that a run saves, and the one that it starts from."""

    save: str | None = option(None, "directory to save checkpoints in")
    save_interval: int | None = option(None, "iterations between checkpoints", legal=POSITIVE)
    save_interval_mins: float | None = option(
        None, "minutes between checkpoints, in addition to --save-interval or instead of it", legal=POSITIVE
    )
    async_save: bool = option(
        False, "write checkpoints in the background, from a copy in host memory, while training continues"
    )
    on_save_error: str = option(
        "stop", "on a full or failing disk, stop the run or continue without that checkpoint", choices=("stop", "continue")
    )
    load: str | None = option(
        None,
        "directory to load from: the --save of a run, or one iter_ directory in it; if it is the --save of this run, it may "
        "still be empty",
    )
    load_iteration: int | None = option(
        None, "iteration to load (default: the latest)", aliases=("--ckpt-step",), legal=NOT_NEGATIVE
    )
    exit_on_missing_checkpoint: bool = option(
        False, "fail instead of starting from scratch when --load is the directory of --save and is empty"
    )
    auto_resume: bool = option(
        False, "resume from the newest complete checkpoint of --save, or start from scratch if it has none"
    )
    overwrite: bool = option(
        False,
        "start a new run although --save holds checkpoints; they are removed when the new run's first checkpoint is complete, "
        "and can be resumed until then. Nothing else is removed: a checkpoint with files that no run wrote is refused. The old "
        "metrics.jsonl becomes metrics.1.jsonl",
    )
    allow_data_change: bool = option(
        False, "on resume, use the data of the command line although it is not that of the checkpoint"
    )
    finetune: bool = option(
        False, "load weights only: start at iteration 0 with a new optimizer state and the data from the beginning"
    )
    no_load_optim: bool = option(False, "do not load the optimizer state; start with a new one")
    no_save_optim: bool = option(False, "do not save the optimizer state")
    use_checkpoint_args: bool = option(
        False, "take model architecture, sequence length and tokenizer from the checkpoint unless a flag gives them"
    )
    keep_last: int | None = option(None, "number of newest checkpoints to keep (default: all)", legal=POSITIVE)
    keep_every: int | None = option(
        None, "keep checkpoints of iterations that are multiples of this, in addition to --keep-last", legal=POSITIVE
    )


def starts_fresh(checkpoint: CheckpointConfig) -> bool:
    """Return whether this is the first start of a run: --load and --save are one directory, which contains no checkpoint yet.

    Megatron-LM's scripts give `--save C --load C` at every start. The result is False if the checkpoint must exist: with
    --finetune, --load-iteration or --exit-on-missing-checkpoint.
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
    """Settings of saving need --save, those of loading need --load, and --auto-resume excludes --overwrite."""
    saving = ("auto_resume", "keep_last", "keep_every", "save_interval_mins", "async_save", "on_save_error", "overwrite")
    yield from needs(c, [f"checkpoint.{name}" for name in saving], "checkpoint.save")
    loading = ("finetune", "load_iteration", "use_checkpoint_args")
    yield from needs(c, [f"checkpoint.{name}" for name in loading], "checkpoint.load")
    yield from exclusive(c, "checkpoint.auto_resume", "checkpoint.overwrite")


def saving(c: ConfigCheck) -> Iterator[Problem]:
    """A run with --save has an interval between checkpoints."""
    intervals = ("checkpoint.save_interval", "checkpoint.save_interval_mins")
    if c.is_set("checkpoint.save") and all(c[name] is None and name not in c.invalid for name in intervals):
        yield Problem(c.flag_text("checkpoint.save"), "needs `--save-interval` or `--save-interval-mins`")


def load_directory(c: ConfigCheck) -> Iterator[Problem]:
    """--load, or --pretrained-checkpoint, names a directory that contains a finished checkpoint of the requested iteration.

    If no iteration is requested, any finished checkpoint will do. train/resume.py chooses one, and verifies its files.
    """
    if c["checkpoint.load"] is None or may_start_empty(c):
        return
    root, requested = Path(c["checkpoint.load"]), c["checkpoint.load_iteration"]
    # A task puts --pretrained-checkpoint in the place of --load; name the flag that the user gave.
    pretrained = c["task.pretrained_checkpoint"] == c["checkpoint.load"]
    what = c.flag_text("task.pretrained_checkpoint" if pretrained else "checkpoint.load")
    advice = "; leave out --load to start from new weights, or use --auto-resume to resume from --save if it has checkpoints"
    if c["task.task"] is not None:
        advice = ""  # a task evaluates or fine-tunes a model, and cannot start from scratch
    if not os.path.isdir(root):
        yield Problem(what, _describe_missing(root, advice))
        return
    try:
        empty, present = next(os.scandir(root), None) is None, list_iterations(root)
        foreign = None if os.path.exists(root / MANIFEST) or has_finished_checkpoint(root) else recognize_directory(root)
    except OSError as error:
        yield Problem(what, f"cannot be read: {error.strerror}")
        return
    if empty:
        yield Problem(what, "is an empty directory" + advice)
    elif foreign is not None:
        yield Problem(what, f"is {foreign}")
    elif os.path.exists(root / MANIFEST):  # one checkpoint, rather than a directory that contains several
        match = re.fullmatch(r"iter_(\d+)", root.resolve().name)
        if match and requested is not None and requested != int(match[1]):
            yield Problem(f"{what} and {c.flag_text('checkpoint.load_iteration')}", "name different iterations")
    else:
        yield from _missing_iteration(c, what, root, present, advice)


def _missing_iteration(c: ConfigCheck, what: str, root: Path, present: list[int], advice: str) -> Iterator[Problem]:
    """Yield a problem if a directory of checkpoints lacks the requested iteration, or any finished checkpoint.

    Args:
        c: the configuration.
        what: the setting that names the directory, for the message.
        root: the directory.
        present: iterations of the checkpoints in the directory, finished or not.
        advice: text that is appended if the directory contains nothing to load.
    """
    requested = c["checkpoint.load_iteration"]
    finished = [number for number in present if os.path.exists(root / f"iter_{number:07d}" / MANIFEST)]
    if requested is not None and requested not in present:
        listed = ", ".join(map(str, present[-8:])) or "none"
        yield Problem(c.flag_text("checkpoint.load_iteration"), f"is not in {root}", listed)
    elif not present:
        yield Problem(what, f"holds no checkpoint: neither {MANIFEST} nor an iter_ directory" + advice)
    elif requested is not None and requested not in finished:
        missing = root / f"iter_{requested:07d}" / MANIFEST
        legal = ", ".join(map(str, finished[-8:])) or "none"
        yield Problem(what, f"is not finished: {missing} does not exist; choose another with --load-iteration", legal)
    elif not finished:
        yield Problem(what, f"holds no finished checkpoint: none of its iter_ directories has a {MANIFEST}" + advice)


def _describe_missing(root: Path, advice: str) -> str:
    """Return the mistake in a --load that is not a directory, with `advice` at the end if the kind of file is not known."""
    nearby = "" if os.path.lexists(root) else suggest_paths(root)
    kind = None if nearby.startswith("; near it") else recognize(root)
    if os.path.exists(root):
        return f"is a file, {kind}" if kind else f"is a file; a checkpoint is a directory{advice}"
    if os.path.islink(root):
        return f"is a link to {os.readlink(root)}, which does not exist{advice}"
    return f"is {kind}" if kind else f"does not exist{nearby}{advice}"


def has_finished_checkpoint(root: Path) -> bool:
    """Return whether a directory contains at least one finished checkpoint."""
    return any(os.path.exists(root / f"iter_{number:07d}" / MANIFEST) for number in list_iterations(root))


def may_start_empty(c: ConfigCheck) -> bool:
    """Return whether --load may be empty, as at the first start of a training run. An evaluation would use random weights."""
    return starts_fresh(c.resolved.checkpoint) and not c["eval.skip_train"] and c["task.task"] is None


def remarks(c: ConfigCheck) -> Iterator[str]:
    """Yield a remark for --save-interval without --save."""
    if c.raw.checkpoint.save_interval is not None and c.raw.checkpoint.save is None:
        yield "--save-interval changes nothing: nothing is saved without --save"


RULES = Rules(every_run=(checkpoint_companions,), pretraining=(saving,), disk=(load_directory,), remarks=(remarks,))
