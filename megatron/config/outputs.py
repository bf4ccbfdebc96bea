"""The rules of what a run writes: over nothing that it reads, over no file that is something else, and where it may."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from megatron.config.check import ConfigCheck
from megatron.config.data import PATHS, prefixes
from megatron.config.directories import MANIFEST
from megatron.config.errors import Problem
from megatron.config.tokenizer import TOKENIZER_FILES
from megatron.files.outputs import InputPaths, files_in, holds_other_files, reason_unwritable
from megatron.files.regular import open_regular

HEAD = 1 << 12  # bytes of a file that show what it is
FILES = {"log.metrics_path": "a file of metrics", "task.results_path": "a file of results"}


def check_outputs(checked: ConfigCheck, settings: Sequence[str]) -> list[Problem]:
    """Everything that is wrong with where a run is to write. settings: the files that its settings were read from."""
    read = InputPaths([*_read(checked), *settings])
    found = list(_overwritten(checked, read))
    said = {problem.what for problem in found}
    return [
        *found,
        *(problem for problem in _other_kind(checked) if problem.what not in said),
        *_save(checked),
        *_wandb(checked),
    ]


def writable(c: ConfigCheck) -> Iterator[Problem]:
    """Check that a run can write what it is going to."""
    folders = {name: c[name] for name in ("checkpoint.save", "log.tensorboard_dir", "log.profile_pipeline")}
    files = {"log.metrics_path": c.raw.log.metrics_path, "task.results_path": c.raw.task.results_path}
    for name, typed in files.items():
        if typed is not None:
            folders[name] = str(Path(typed).absolute().parent)
        if c[name] is not None and os.path.isdir(c[name]):
            yield Problem(c.flag_text(name), "cannot be written: it is a directory, not a file")
    for name, folder in folders.items():
        if folder is None:
            continue
        if rule := reason_unwritable(folder):
            yield Problem(c.flag_text(name), rule)
        elif name in files and os.path.isfile(c[name]) and not os.access(c[name], os.W_OK):
            yield Problem(c.flag_text(name), "cannot be written: permission denied")


def _outputs(c: ConfigCheck) -> Iterator[tuple[str, Path]]:
    """Every single file that a run writes or removes, with the setting it comes from."""
    for name in (*FILES, "batch.stop_file"):
        if c[name] is not None:
            yield name, Path(c[name])
    names: tuple[str, ...] = ("latest_checkpointed_iteration.txt", "progress.json", "wandb.json")
    names += () if c["batch.stop_file"] is not None else ("stop",)
    folders = {"log.profile_pipeline": ("pipeline_profile.svg", "pipeline_profile.json"), "checkpoint.save": names}
    for name, files in folders.items():
        if c[name] is not None:
            yield from ((name, Path(c[name]) / file) for file in files)


def _read(c: ConfigCheck) -> Iterator[str | Path]:
    """Every file that a run reads, and every directory of a checkpoint or of a task's samples."""
    for name in PATHS:
        for prefix in prefixes(c[name]) or ():
            stem = prefix[:-4] if prefix.endswith((".bin", ".idx")) else prefix
            yield from (stem + ending for ending in (".bin", ".idx", ".meta.json"))
    for name in TOKENIZER_FILES.get(c["tokenizer.tokenizer_type"], ()):
        if c[name] is not None:
            yield from files_in(c[name])
    yield from (*c["task.valid_data"], *c["task.train_data"])
    for name in ("checkpoint.load", "checkpoint.save"):
        if c[name] is not None and os.path.isdir(c[name]):
            yield from Path(c[name]).glob("iter_*/")
    if c["checkpoint.load"] is not None and os.path.isfile(Path(c["checkpoint.load"]) / MANIFEST):
        yield c["checkpoint.load"]  # one itself


def _overwritten(c: ConfigCheck, read: InputPaths) -> Iterator[Problem]:
    """Nothing is written over what is read, or twice to one place."""
    seen: dict[str, str] = {}
    for name, path in _outputs(c):
        if (over := read.find_conflict(path)) is not None and not os.path.isdir(path):  # which another rule says
            where = "lies in" if os.path.isdir(over) else "is"
            rule = f"cannot be written: {path} {where} {over}, which this command reads; choose another place"
            yield Problem(c.flag_text(name), rule)
        place = os.path.realpath(path)
        if (other := seen.setdefault(place, name)) != name:
            yield Problem(f"{c.flag_text(other, name)}", f"are both written to {path}")


def _other_kind(c: ConfigCheck) -> Iterator[Problem]:
    """What is there already under the name of metrics or results is that."""
    for name, kind in FILES.items():
        if c[name] is None or not os.path.isfile(c[name]):
            continue
        with suppress(OSError), open_regular(c[name]) as file:
            head = file.read(HEAD).lstrip()
            known = b'{"iteration"' if name == "log.metrics_path" else b"{"
            if head and not head.startswith(known) and not known.startswith(head):
                yield Problem(c.flag_text(name), f"is there already and is not {kind}; choose another place")


def _wandb(c: ConfigCheck) -> Iterator[Problem]:
    """W&B's package is there. A directory `wandb`, which it leaves where it runs, is none."""
    if c["log.wandb_project"] is not None:
        spec = find_spec("wandb")
        if spec is None or spec.origin is None:
            yield Problem(c.flag_text("log.wandb_project"), "needs W&B, which is not installed: pip install -e '.[wandb]'")


def _save(c: ConfigCheck) -> Iterator[Problem]:
    """--save is a directory of checkpoints of this program, not one of them, and not another's."""
    if c["checkpoint.save"] is None or not os.path.isdir(c["checkpoint.save"]):
        return
    root, what = Path(c["checkpoint.save"]), c.flag_text("checkpoint.save")
    with suppress(OSError):
        if os.path.isfile(root / MANIFEST):
            yield Problem(what, f"is a checkpoint itself; give the directory that holds it, {root.resolve().parent}")
        foreign = sorted(p.name for p in root.iterdir() if re.fullmatch(r"iter_\d{7,15}", p.name) and holds_other_files(p))
        if foreign:
            rule = f"holds what is no checkpoint of this program: {', '.join(foreign[:3])}"
            yield Problem(what, f"{rule}; choose another place, or take it away")
