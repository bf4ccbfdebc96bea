"""Rules for the files that a run writes: they overwrite no input and no other program's file, and writing is permitted."""

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

HEAD_BYTES = 1 << 12  # number of bytes that are read from the start of a file to recognize its kind
# Settings that name JSON outputs -> kind of file, for messages.
JSON_OUTPUTS = {"log.metrics_path": "a file of metrics", "task.results_path": "a file of results"}


def check_outputs(checked: ConfigCheck, settings_files: Sequence[str]) -> list[Problem]:
    """Return all mistakes in the settings that name outputs.

    Args:
        checked: the configuration.
        settings_files: paths of the files that the settings were read from, which must not be overwritten either.
    """
    inputs = InputPaths([*_input_paths(checked), *settings_files])
    overwritten = list(_overwritten(checked, inputs))
    reported = {problem.what for problem in overwritten}  # a setting gets only the first of the two kinds of problems
    return [
        *overwritten,
        *(problem for problem in _wrong_kind(checked) if problem.what not in reported),
        *_save_directory(checked),
        *_wandb_installed(checked),
    ]


def writable(c: ConfigCheck) -> Iterator[Problem]:
    """Output directories, and output files that exist already, are writable."""
    folders = {name: c[name] for name in ("checkpoint.save", "log.tensorboard_dir", "log.profile_pipeline")}
    # Only the paths that the user gave: the defaults are in --save, which is checked anyway.
    files = {"log.metrics_path": c.raw.log.metrics_path, "task.results_path": c.raw.task.results_path}
    for name, path in files.items():
        if path is not None:
            folders[name] = str(Path(path).absolute().parent)
        if c[name] is not None and os.path.isdir(c[name]):
            yield Problem(c.flag_text(name), "cannot be written: it is a directory, not a file")
    for name, folder in folders.items():
        if folder is None:
            continue
        if rule := reason_unwritable(folder):
            yield Problem(c.flag_text(name), rule)
        elif name in files and os.path.isfile(c[name]) and not os.access(c[name], os.W_OK):
            yield Problem(c.flag_text(name), "cannot be written: permission denied")


def _output_paths(c: ConfigCheck) -> Iterator[tuple[str, Path]]:
    """Yield the files of fixed names that a run writes or removes, each with the setting that names it or its directory."""
    for name in (*JSON_OUTPUTS, "batch.stop_file"):
        if c[name] is not None:
            yield name, Path(c[name])
    names: tuple[str, ...] = ("latest_checkpointed_iteration.txt", "progress.json", "wandb.json")
    names += () if c["batch.stop_file"] is not None else ("stop",)
    folders = {"log.profile_pipeline": ("pipeline_profile.svg", "pipeline_profile.json"), "checkpoint.save": names}
    for name, files in folders.items():
        if c[name] is not None:
            yield from ((name, Path(c[name]) / file) for file in files)


def _input_paths(c: ConfigCheck) -> Iterator[str | Path]:
    """Yield the files that a run reads, and the directories of checkpoints and of a task's samples."""
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
        yield c["checkpoint.load"]  # one checkpoint, rather than a directory that contains several


def _overwritten(c: ConfigCheck, inputs: InputPaths) -> Iterator[Problem]:
    """No output overwrites an input or another output."""
    setting_by_path: dict[str, str] = {}
    for name, path in _output_paths(c):
        # `writable` reports an output path that is a directory.
        if (conflict := inputs.find_conflict(path)) is not None and not os.path.isdir(path):
            relation = "is in" if os.path.isdir(conflict) else "is"
            rule = f"cannot be written: {path} {relation} {conflict}, which this command reads; choose another place"
            yield Problem(c.flag_text(name), rule)
        if (other := setting_by_path.setdefault(os.path.realpath(path), name)) != name:
            yield Problem(f"{c.flag_text(other, name)}", f"are both written to {path}")


def _wrong_kind(c: ConfigCheck) -> Iterator[Problem]:
    """A file that exists at the path of the metrics or the results contains metrics or results."""
    for name, kind in JSON_OUTPUTS.items():
        if c[name] is None or not os.path.isfile(c[name]):
            continue
        with suppress(OSError), open_regular(c[name]) as file:
            head = file.read(HEAD_BYTES).lstrip()
            prefix = b'{"iteration"' if name == "log.metrics_path" else b"{"
            # A run that was killed may have written only a part of the prefix.
            if head and not head.startswith(prefix) and not prefix.startswith(head):
                yield Problem(c.flag_text(name), f"exists already and is not {kind}; choose another place")


def _wandb_installed(c: ConfigCheck) -> Iterator[Problem]:
    """W&B is installed if it is used."""
    if c["log.wandb_project"] is not None:
        # A spec without an origin is the directory `wandb` that W&B creates in the working directory, not the package.
        spec = find_spec("wandb")
        if spec is None or spec.origin is None:
            yield Problem(c.flag_text("log.wandb_project"), "needs W&B, which is not installed: pip install -e '.[wandb]'")


def _save_directory(c: ConfigCheck) -> Iterator[Problem]:
    """--save is not a checkpoint itself, and contains no checkpoints of other programs."""
    if c["checkpoint.save"] is None or not os.path.isdir(c["checkpoint.save"]):
        return
    root, what = Path(c["checkpoint.save"]), c.flag_text("checkpoint.save")
    with suppress(OSError):
        if os.path.isfile(root / MANIFEST):
            yield Problem(what, f"is a checkpoint itself; give the directory that holds it, {root.resolve().parent}")
        foreign = sorted(p.name for p in root.iterdir() if re.fullmatch(r"iter_\d{7,15}", p.name) and holds_other_files(p))
        if foreign:
            rule = f"holds directories that are not checkpoints of this program: {', '.join(foreign[:3])}"
            yield Problem(what, f"{rule}; choose another directory, or remove them")
