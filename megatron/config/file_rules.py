"""The rules that look at the disk: data, tokenizer files, and the directories of checkpoints.

A run never begins with something missing: what is named must be there, and what will be written must be writable.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from megatron.config.case import Case, Rule
from megatron.config.directories import MANIFEST, iterations, starts_fresh
from megatron.config.errors import Problem
from megatron.config.options import say
from megatron.config.rules import TOKENIZER_FILES, prefixes
from megatron.config.task_rules import task_files
from megatron.files.outputs import unwritable
from megatron.files.regular import kind_of_file


def _near(path: Path, names: list[str] | None = None) -> str:
    """`; near it: ...` for a path that is not there; the folder to blame when that is missing as well."""
    folder = path.parent
    if names is None:
        if not folder.is_dir():
            while not folder.is_dir():
                path, folder = folder, folder.parent
            return f"; {folder} has no {path.name}" + _near(path)
        try:
            names = [entry.name for entry in os.scandir(folder)]
        except OSError as error:
            return f"; {folder} cannot be read: {error.strerror}"
    close = difflib.get_close_matches(path.name, names, n=3, cutoff=0.6)
    return f"; near it: {', '.join(str(folder / name) for name in close)}" if close else ""


def _unreadable(path: Path) -> str | None:
    """Why a file cannot be read; None when it can."""
    if path.is_dir():
        return "is a directory, not a file"
    if not path.exists():
        return f"does not exist{_near(path)}"
    if kind := kind_of_file(path.stat().st_mode):
        return f"is {kind}, not a regular file"
    if not os.access(path, os.R_OK):
        return "cannot be read: permission denied"
    return None if path.stat().st_size else "is empty"


def tokenizer_files(c: Case) -> Iterator[Problem]:
    """The files of the chosen tokenizer are there."""
    kind = c["tokenizer.tokenizer_type"]
    for name in TOKENIZER_FILES.get(kind, ()):
        if c[name] is None:
            continue
        path = Path(c[name])
        if kind == "HuggingFaceTokenizer" and path.is_dir():
            path = path / "tokenizer.json"
        if wrong := _unreadable(path):
            where = "" if str(path) == c[name] else f"{path} "
            yield Problem(say(name, c[name]), where + wrong)


def datasets(c: Case) -> Iterator[Problem]:
    """Every prefix has its .bin and .idx."""
    for name in ("data.data_path", "data.train_data_path", "data.valid_data_path", "data.test_data_path"):
        for prefix in prefixes(c[name]) or ():
            yield from _dataset(say(name, (prefix,)), prefix)


def _dataset(what: str, prefix: str) -> Iterator[Problem]:
    if prefix.endswith((".bin", ".idx")):
        prefix = prefix[:-4]
    files = [Path(prefix + ending) for ending in (".bin", ".idx")]
    wrong = [(path, why) for path in files if (why := _unreadable(path))]
    if len(wrong) == 2 and not any(path.exists() for path in files):
        folder = files[0].parent
        names = sorted(p.name[:-4] for p in folder.glob("*.idx")) if folder.is_dir() else None
        path = Path(prefix)
        yield Problem(what, f"names no dataset: {prefix}.bin and {prefix}.idx do not exist{_near(path, names)}")
        return
    for path, why in wrong:
        yield Problem(what, f"is no dataset: {path} {why.split(';')[0]}")


def load(c: Case) -> Iterator[Problem]:
    """--load names a directory with a checkpoint in it, and the wanted iteration is there.

    Which one is taken where none is wanted, and whether it is whole, is found out later (train/resume.py).
    """
    if c["checkpoint.load"] is None or first_start(c):
        return
    root, wanted = Path(c["checkpoint.load"]), c["checkpoint.load_iteration"]
    what = say("checkpoint.load", c["checkpoint.load"])
    fresh = "; leave out --load to start from new weights, or use --auto-resume to go on from --save where there is something"
    if not root.is_dir():
        rule = f"does not exist{_near(root)}" if not root.exists() else "is a file; a checkpoint is a directory"
        yield Problem(what, rule + fresh)
        return
    try:
        empty, present = next(os.scandir(root), None) is None, iterations(root)
    except OSError as error:
        yield Problem(what, f"cannot be read: {error}")
        return
    listed = ", ".join(map(str, present[-8:])) or "none"
    finished = [number for number in present if (root / f"iter_{number:07d}" / MANIFEST).exists()]
    if empty:
        yield Problem(what, "is an empty directory" + fresh)
    elif (root / MANIFEST).exists():  # one checkpoint itself
        own = re.fullmatch(r"iter_(\d+)", root.resolve().name)
        if own and wanted is not None and wanted != int(own[1]):
            yield Problem(f"{what} and {say('checkpoint.load_iteration', wanted)}", "name different iterations")
    elif wanted is not None and wanted not in present:
        yield Problem(say("checkpoint.load_iteration", wanted), f"is not in {root}", listed)
    elif not present:
        yield Problem(what, f"holds no checkpoint: neither {MANIFEST} nor an iter_ directory" + fresh)
    elif wanted is not None and wanted not in finished:
        missing = root / f"iter_{wanted:07d}" / MANIFEST
        legal = ", ".join(map(str, finished[-8:])) or "none"
        yield Problem(what, f"is not finished: {missing} does not exist; choose another with --load-iteration", legal)
    elif not finished:
        yield Problem(what, f"holds no finished checkpoint: none of its iter_ directories has a {MANIFEST}" + fresh)


def first_start(c: Case) -> bool:
    """Whether --load is allowed to name nothing yet. An evaluation, or a task, would have random weights."""
    return starts_fresh(c.resolved.checkpoint) and not c["eval.skip_train"] and c["task.task"] is None


def writable(c: Case) -> Iterator[Problem]:
    """What a run will write can be written."""
    folders = {name: c[name] for name in ("checkpoint.save", "log.tensorboard_dir", "log.profile_pipeline")}
    files = {"log.metrics_path": c.typed.log.metrics_path, "task.results_path": c.typed.task.results_path}
    for name, typed in files.items():
        if typed is not None:
            folders[name] = str(Path(typed).absolute().parent)
        if c[name] is not None and Path(c[name]).is_dir():
            yield Problem(say(name, c[name]), "cannot be written: it is a directory, not a file")
    for name, folder in folders.items():
        if folder is None:
            continue
        if rule := unwritable(folder):
            yield Problem(say(name, c[name]), rule)
        elif name in files and os.path.isfile(c[name]) and not os.access(c[name], os.W_OK):
            yield Problem(say(name, c[name]), "cannot be written: permission denied")


def stop_file(c: Case) -> Iterator[Problem]:
    """A stop file can appear, and be removed."""
    if (name := c["batch.stop_file"]) is None:
        return
    path = Path(name).absolute()
    if path.is_dir():
        yield Problem(say("batch.stop_file", name), "is a directory, not a file")
    elif not path.parent.is_dir():
        yield Problem(say("batch.stop_file", name), f"can never appear: there is no directory {path.parent}")


FILE_RULES: tuple[Rule, ...] = (tokenizer_files, datasets, task_files, load, writable, stop_file)


def check_files(case: Case) -> list[Problem]:
    """Everything that is wrong with what `case` names on the disk."""
    return [p for rule in FILE_RULES for p in rule(case)]
