"""Settings of checkpoints: where a run saves its state, and where it loads it from."""

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
        None, "keep checkpoints of iterations that are multiples of this, whatever --keep-last says", legal=POSITIVE
    )


def starts_fresh(checkpoint: CheckpointConfig) -> bool:
    """Return whether --load is the directory of --save and is still empty, so that this is the first start of a run.

    Megatron-LM's scripts give `--save C --load C` at every start. False if the checkpoint must exist: with --finetune, with
    --load-iteration, and with --exit-on-missing-checkpoint.
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
    """Settings of saving and loading need --save and --load, and checkpoints in --save are resumed or overwritten, not both."""
    saving = ("auto_resume", "keep_last", "keep_every", "save_interval_mins", "async_save", "on_save_error", "overwrite")
    yield from needs(c, [f"checkpoint.{name}" for name in saving], "checkpoint.save")
    loading = ("finetune", "load_iteration", "use_checkpoint_args")
    yield from needs(c, [f"checkpoint.{name}" for name in loading], "checkpoint.load")
    yield from exclusive(c, "checkpoint.auto_resume", "checkpoint.overwrite")


def saving(c: ConfigCheck) -> Iterator[Problem]:
    """A run with --save has an interval of saving."""
    intervals = ("checkpoint.save_interval", "checkpoint.save_interval_mins")
    if c.is_set("checkpoint.save") and all(c[name] is None and name not in c.invalid for name in intervals):
        yield Problem(c.flag_text("checkpoint.save"), "needs `--save-interval` or `--save-interval-mins`")


def load_directory(c: ConfigCheck) -> Iterator[Problem]:
    """--load, or --pretrained-checkpoint, names a directory that holds a finished checkpoint of the requested iteration.

    train/resume.py chooses the iteration when none is requested, and verifies the files.
    """
    if c["checkpoint.load"] is None or may_start_empty(c):
        return
    root, requested = Path(c["checkpoint.load"]), c["checkpoint.load_iteration"]
    # A task puts --pretrained-checkpoint in the place of --load; name the flag that the user gave.
    pretrained = c["task.pretrained_checkpoint"] == c["checkpoint.load"]
    what = c.flag_text("task.pretrained_checkpoint" if pretrained else "checkpoint.load")
    fresh = "; leave out --load to start from new weights, or use --auto-resume to go on from --save where there is something"
    if c["task.task"] is not None:
        fresh = ""  # a task evaluates or fine-tunes a model, and cannot start from scratch
    if not os.path.isdir(root):
        yield Problem(what, _describe_missing(root, fresh))
        return
    try:
        empty, present = next(os.scandir(root), None) is None, list_iterations(root)
        other = None if os.path.exists(root / MANIFEST) or has_finished_checkpoint(root) else recognize_directory(root)
    except OSError as error:
        yield Problem(what, f"cannot be read: {error.strerror}")
        return
    if empty:
        yield Problem(what, "is an empty directory" + fresh)
    elif other is not None:
        yield Problem(what, f"is {other}")
    elif os.path.exists(root / MANIFEST):  # a single checkpoint, not a directory of them
        own = re.fullmatch(r"iter_(\d+)", root.resolve().name)
        if own and requested is not None and requested != int(own[1]):
            yield Problem(f"{what} and {c.flag_text('checkpoint.load_iteration')}", "name different iterations")
    else:
        yield from _missing_iteration(c, what, root, present, fresh)


def _missing_iteration(c: ConfigCheck, what: str, root: Path, present: list[int], fresh: str) -> Iterator[Problem]:
    """Yield a problem when a directory of checkpoints has none that is finished, or not the requested one.

    Args:
        c: the configuration.
        what: the setting that names the directory, for the message.
        root: the directory.
        present: iterations in it, finished or not.
        fresh: advice that is appended when there is nothing to load.
    """
    requested = c["checkpoint.load_iteration"]
    finished = [number for number in present if os.path.exists(root / f"iter_{number:07d}" / MANIFEST)]
    if requested is not None and requested not in present:
        listed = ", ".join(map(str, present[-8:])) or "none"
        yield Problem(c.flag_text("checkpoint.load_iteration"), f"is not in {root}", listed)
    elif not present:
        yield Problem(what, f"holds no checkpoint: neither {MANIFEST} nor an iter_ directory" + fresh)
    elif requested is not None and requested not in finished:
        missing = root / f"iter_{requested:07d}" / MANIFEST
        legal = ", ".join(map(str, finished[-8:])) or "none"
        yield Problem(what, f"is not finished: {missing} does not exist; choose another with --load-iteration", legal)
    elif not finished:
        yield Problem(what, f"holds no finished checkpoint: none of its iter_ directories has a {MANIFEST}" + fresh)


def _describe_missing(root: Path, fresh: str) -> str:
    """Return the mistake in a --load that is not a directory; `fresh` is advice that is appended if there is no other."""
    nearby = "" if os.path.lexists(root) else suggest_paths(root)
    found = None if nearby.startswith("; near it") else recognize(root)
    if os.path.exists(root):
        return f"is a file, {found}" if found else f"is a file; a checkpoint is a directory{fresh}"
    if os.path.islink(root):
        return f"is a link to {os.readlink(root)}, which does not exist{fresh}"
    return f"is {found}" if found else f"does not exist{nearby}{fresh}"


def has_finished_checkpoint(root: Path) -> bool:
    """Return whether a directory holds a finished checkpoint."""
    return any(os.path.exists(root / f"iter_{number:07d}" / MANIFEST) for number in list_iterations(root))


def may_start_empty(c: ConfigCheck) -> bool:
    """Return whether --load may be empty: at the first start of a run that trains. Others would evaluate random weights."""
    return starts_fresh(c.resolved.checkpoint) and not c["eval.skip_train"] and c["task.task"] is None


def remarks(c: ConfigCheck) -> Iterator[str]:
    """Yield a remark for --save-interval without --save."""
    if c.raw.checkpoint.save_interval is not None and c.raw.checkpoint.save is None:
        yield "--save-interval changes nothing: nothing is saved without --save"


RULES = Rules(every_run=(checkpoint_companions,), pretraining=(saving,), disk=(load_directory,), remarks=(remarks,))
