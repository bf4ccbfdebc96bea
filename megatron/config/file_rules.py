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
from megatron.config.options import by_name, flag_text
from megatron.config.rules import TOKENIZER_FILES, prefixes
from megatron.config.task_rules import task_files
from megatron.files.foreign import foreign, foreign_directory, hub_name, is_pointer
from megatron.files.outputs import unwritable
from megatron.files.prefixes import meant_prefix
from megatron.files.regular import kind_of_file


def _near(path: Path, names: list[str] | None = None) -> str:
    """`; near it: ...` for a path that is not there; the folder to blame when that is missing as well."""
    folder = path.parent
    if names is None:
        if not os.path.isdir(folder):
            while not os.path.isdir(folder):
                path, folder = folder, folder.parent
            return f"; {folder} has no {path.name}" + _near(path)
        try:
            names = [entry.name for entry in os.scandir(folder)]
        except OSError as error:
            return f"; {folder} cannot be read: {error.strerror}"
    close = difflib.get_close_matches(path.name, names, n=3, cutoff=0.6)
    return f"; near it: {', '.join(str(folder / name) for name in close)}" if close else ""


def _unreadable(path: Path, flag: str = "") -> str | None:
    """Why a file cannot be read; None when it can. flag: that names it, where it may be given the name of a model instead."""
    if os.path.isdir(path):
        return "is a directory, not a file"
    if not os.path.exists(path):
        near = _near(path)
        then = "give DIR" if flag == "--tokenizer-model" else f"give {flag} its file in DIR"
        hub = hub_name(path, then) if flag and not near.startswith("; near it") else None
        return f"is {hub}" if hub else f"does not exist{near}"
    if kind := kind_of_file(path.stat().st_mode):
        return f"is {kind}, not a regular file"
    if not os.access(path, os.R_OK):
        return "cannot be read: permission denied"
    if is_pointer(path):
        return "is a pointer of Git LFS, in place of the file itself; run `git lfs pull` where it was cloned"
    return None if path.stat().st_size else "is empty"


def tokenizer_files(c: Case) -> Iterator[Problem]:
    """The files of the chosen tokenizer are there."""
    kind = c["tokenizer.tokenizer_type"]
    for name in TOKENIZER_FILES.get(kind, ()):
        if c[name] is None:
            continue
        path = Path(c[name])
        if kind == "HuggingFaceTokenizer" and os.path.isdir(path):
            path = path / "tokenizer.json"
        if wrong := _unreadable(path, by_name()[name].flag):
            where = "" if str(path) == c[name] else f"{path} "
            yield Problem(flag_text(name, c[name]), where + wrong)


def datasets(c: Case) -> Iterator[Problem]:
    """Every prefix has its .bin and .idx."""
    for name in ("data.data_path", "data.train_data_path", "data.valid_data_path", "data.test_data_path"):
        for prefix in prefixes(c[name]) or ():
            level = "sentence" if c["model.architecture"] == "bert" else "document"
            yield from missing_dataset(flag_text(name, (prefix,)), prefix, level)


def missing_dataset(what: str, prefix: str, level: str = "document") -> Iterator[Problem]:
    """A problem where a prefix has no .bin and .idx.

    Args:
        what: the setting that names it, in words.
        prefix: the prefix, or one of the two files.
        level: sentence or document, what the program takes: the end of the name that preprocessing gave.
    """
    if prefix.endswith((".bin", ".idx")):
        prefix = prefix[:-4]
    files = [Path(prefix + ending) for ending in (".bin", ".idx")]
    wrong = [(path, why) for path in files if (why := _unreadable(path))]
    if len(wrong) == 2 and not any(os.path.exists(path) for path in files):
        folder = files[0].parent
        names = sorted(p.name[:-4] for p in folder.glob("*.idx")) if os.access(folder, os.R_OK | os.X_OK) else None
        meant = meant_prefix(prefix, level)
        hint = f"; {meant}" if meant else _near(Path(prefix), names)
        yield Problem(what, f"names no dataset: {prefix}.bin and {prefix}.idx do not exist{hint}")
        return
    for path, why in wrong:
        yield Problem(what, f"is no dataset: {path} {why.split(';')[0] if why.startswith('does not exist') else why}")


def load(c: Case) -> Iterator[Problem]:
    """--load, or --pretrained-checkpoint, names a directory with a checkpoint in it, and the wanted iteration is there.

    Which one is taken where none is wanted, and whether it is whole, is found out later (train/resume.py).
    """
    if c["checkpoint.load"] is None or first_start(c):
        return
    root, wanted = Path(c["checkpoint.load"]), c["checkpoint.load_iteration"]
    pretrained = c["task.pretrained_checkpoint"] == c["checkpoint.load"]
    what = flag_text("task.pretrained_checkpoint" if pretrained else "checkpoint.load", c["checkpoint.load"])
    fresh = "; leave out --load to start from new weights, or use --auto-resume to go on from --save where there is something"
    if c["task.task"] is not None:
        fresh = ""  # a task asks a model that is there, or teaches it
    if not os.path.isdir(root):
        yield Problem(what, _no_directory(root, fresh))
        return
    try:
        empty, present = next(os.scandir(root), None) is None, iterations(root)
        other = None if os.path.exists(root / MANIFEST) or first_finished(root) else foreign_directory(root)
    except OSError as error:
        yield Problem(what, f"cannot be read: {error.strerror}")
        return
    listed = ", ".join(map(str, present[-8:])) or "none"
    finished = [number for number in present if os.path.exists(root / f"iter_{number:07d}" / MANIFEST)]
    if empty:
        yield Problem(what, "is an empty directory" + fresh)
    elif other is not None:
        yield Problem(what, f"is {other}")
    elif os.path.exists(root / MANIFEST):  # one checkpoint itself
        own = re.fullmatch(r"iter_(\d+)", root.resolve().name)
        if own and wanted is not None and wanted != int(own[1]):
            yield Problem(f"{what} and {flag_text('checkpoint.load_iteration', wanted)}", "name different iterations")
    elif wanted is not None and wanted not in present:
        yield Problem(flag_text("checkpoint.load_iteration", wanted), f"is not in {root}", listed)
    elif not present:
        yield Problem(what, f"holds no checkpoint: neither {MANIFEST} nor an iter_ directory" + fresh)
    elif wanted is not None and wanted not in finished:
        missing = root / f"iter_{wanted:07d}" / MANIFEST
        legal = ", ".join(map(str, finished[-8:])) or "none"
        yield Problem(what, f"is not finished: {missing} does not exist; choose another with --load-iteration", legal)
    elif not finished:
        yield Problem(what, f"holds no finished checkpoint: none of its iter_ directories has a {MANIFEST}" + fresh)


def _no_directory(root: Path, fresh: str) -> str:
    """What is wrong with a --load that is no directory; the words of `fresh` help where nothing else does."""
    near = "" if os.path.lexists(root) else _near(root)
    found = None if near.startswith("; near it") else foreign(root)
    if os.path.exists(root):
        return f"is a file, {found}" if found else f"is a file; a checkpoint is a directory{fresh}"
    if os.path.islink(root):
        return f"is a link to {os.readlink(root)}, which does not exist{fresh}"
    return f"is {found}" if found else f"does not exist{near}{fresh}"


def first_finished(root: Path) -> bool:
    """Return whether one of the checkpoints in a directory is finished."""
    return any(os.path.exists(root / f"iter_{number:07d}" / MANIFEST) for number in iterations(root))


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
        if c[name] is not None and os.path.isdir(c[name]):
            yield Problem(flag_text(name, c[name]), "cannot be written: it is a directory, not a file")
    for name, folder in folders.items():
        if folder is None:
            continue
        if rule := unwritable(folder):
            yield Problem(flag_text(name, c[name]), rule)
        elif name in files and os.path.isfile(c[name]) and not os.access(c[name], os.W_OK):
            yield Problem(flag_text(name, c[name]), "cannot be written: permission denied")


def stop_file(c: Case) -> Iterator[Problem]:
    """A stop file can appear, and be removed."""
    if (name := c["batch.stop_file"]) is None:
        return
    path = Path(name).absolute()
    if os.path.isdir(path):
        yield Problem(flag_text("batch.stop_file", name), "is a directory, not a file")
    elif not os.path.isdir(path.parent):
        yield Problem(flag_text("batch.stop_file", name), f"can never appear: there is no directory {path.parent}")
    elif not os.access(path.parent, os.W_OK | os.X_OK):
        yield Problem(flag_text("batch.stop_file", name), f"could not be seen and removed: permission denied in {path.parent}")


FILE_RULES: tuple[Rule, ...] = (tokenizer_files, datasets, task_files, load, writable, stop_file)


def check_files(case: Case) -> list[Problem]:
    """Everything that is wrong with what `case` names on the disk."""
    return [p for rule in FILE_RULES for p in rule(case)]
