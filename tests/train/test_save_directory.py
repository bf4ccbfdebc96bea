"""Runs whose --save holds checkpoints already: every combination of flags, and what --overwrite leaves alone."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
from legal_run import problems

from megatron.checkpoint.layout import newest_complete
from megatron.checkpoint.save import save
from megatron.checkpoint.storage import Storage
from megatron.config.errors import ConfigError
from megatron.config.schema import CheckpointConfig, EvalConfig, RunSettings, TaskConfig
from megatron.mesh.mesh import Mesh
from megatron.train.interrupt import resume_advice
from megatron.train.resume import find_source
from megatron.train.save_directory import CheckpointsToReplace, check_save, set_metrics_aside, set_run_aside
from megatron.train.source import StateSource
from megatron.train.state import TrainState


@pytest.fixture
def disk(tmp_path, monkeypatch):
    """run: checkpoints 4 and 8. other: 6. new: nothing. link: another name of run. torn: nothing whole. emptied: a tracker."""
    monkeypatch.chdir(tmp_path)
    for name, numbers in (("run", (4, 8)), ("other", (6,))):
        for number in numbers:
            save(Path(name), number, {"train": TrainState(iteration=number)}, Mesh.single(), config={})
    for name in ("new", "torn/iter_0000004", "emptied"):
        Path(name).mkdir(parents=True)
    Path("emptied/latest_checkpointed_iteration.txt").write_text("4")
    Path("link").symlink_to("run")
    return tmp_path


def start(flags: str) -> StateSource:
    """Return the state that a command with these flags of [checkpoint] starts from."""
    known = {"save": str, "load": str, "load-iteration": int}
    values: dict[str, object] = {}
    for part in flags.split("--")[1:]:
        name, _, value = part.strip().partition(" ")
        values[name.replace("-", "_")] = known[name](value) if name in known else True
    skip = bool(values.pop("skip_train", False))
    config = RunSettings(checkpoint=CheckpointConfig(**values), eval=EvalConfig(skip_train=skip))
    directory, iteration, checkpoint = None, 0, config.checkpoint
    goes_on = checkpoint.auto_resume and Path(checkpoint.save or "", "iter_0000004").is_dir()
    root = checkpoint.save if goes_on else checkpoint.load
    if root is not None and Path(root).is_dir() and "new" not in root:
        name = Path(root)
        number = checkpoint.load_iteration or (6 if "other" in root else 8)
        directory = name if name.name.startswith("iter_") else name / f"iter_{number:07d}"
        iteration = int(directory.name[5:])
    source = StateSource(directory, state=TrainState(iteration=iteration), progress=not checkpoint.finetune)
    return replace(source, lines=tuple(check_save(source, config)))


GOES = [
    ("--save new", ""),
    ("--save absent --load run", ""),
    ("--save new --load run --finetune", ""),
    ("--save new --load new", ""),
    ("--save run --auto-resume", ""),
    ("--save run --auto-resume --load other", ""),
    ("--save run --load run", ""),
    ("--save run --load link", ""),
    ("--save link/ --load run/../run", ""),
    ("--save run --load run/iter_0000008", ""),
    ("--save run --load run --load-iteration 4", "going back to iteration 4: the checkpoints of iterations 8 in run stay"),
    ("--save run --load run/iter_0000004", "going back to iteration 4: "),
    (
        "--save run --load other",
        "note: run contains the checkpoints of iterations 4, 8 of another run than --load other: ",
    ),
    ("--save run --load other --finetune", "note: run contains the checkpoints of iterations 4, 8 of another run than --load "),
    (
        "--save torn --load other",
        "note: torn contains the checkpoints of iterations 4 of another run than --load ",
    ),
    ("--save emptied --load other", "note: emptied contains the remains of checkpoints of another run than --load other: "),
    ("--save run --skip-train", ""),
    ("--save run --skip-train --load other", ""),
    ("--save new --overwrite", ""),
    ("--save run --overwrite", "--overwrite: the checkpoints of iterations 4, 8 in run stay until this run's first one is"),
    ("--save run --overwrite --load other", "--overwrite: the checkpoints of iterations 4, 8"),
    ("--save run --overwrite --load run --finetune", "--overwrite: the checkpoints of iterations 4, 8"),
]
REFUSED = [
    ("--save run", "this new run would overwrite them; legal: --auto-resume resumes from them; --overwrite replaces them"),
    ("--save link", "would overwrite them"),
    ("--save torn", "would overwrite them"),
    ("--save emptied", "would overwrite them"),
    ("--save run --finetune --load run", "--finetune would overwrite them, including the one that it loads"),
    ("--save run --overwrite --load run", "while --overwrite replaces them"),
    ("--save run/iter_0000004", "is one checkpoint, not a directory of them"),
    ("--save run/iter_0000004 --auto-resume", "is one checkpoint, not a directory of them"),
    ("--save torn --overwrite", "cannot be replaced with --overwrite: torn/iter_0000004: it has no manifest.json"),
]


@pytest.mark.parametrize(("flags", "line"), GOES)
def test_flags_that_go_on_or_start_fresh(disk, flags, line):
    said = start(flags).lines
    assert said == () if not line else said[0].startswith(line) and len(said) == 1


@pytest.mark.parametrize(("flags", "why"), REFUSED)
def test_flags_that_would_mix_runs_are_refused(disk, flags, why):
    with pytest.raises(ConfigError) as caught:
        start(flags)
    (problem,) = map(str, caught.value.problems)
    assert problem.startswith(f"`{flags.split(' --')[0]}`") and why in problem
    if "iter_" not in flags and "torn --over" not in flags:
        assert "another --save keeps both" in problem


def test_fine_tuning_again_is_refused_since_it_is_no_load(disk):
    task = TaskConfig(pretrained_checkpoint="other")
    config = RunSettings(checkpoint=CheckpointConfig(save="run", load="other", finetune=True), task=task)
    with pytest.raises(ConfigError, match="fine-tuning from --pretrained-checkpoint other would overwrite them"):
        check_save(StateSource(Path("other/iter_0000006")), config)


def test_another_runs_checkpoints_are_set_aside_whole(disk):
    """Before the first save of the new run: so that its number never meets theirs, and --auto-resume never takes them."""
    Path("run/iter_0000002").symlink_to("../other/iter_0000006")
    for name in ("metrics.jsonl", "progress.json", "notes.txt"):
        Path("run", name).write_text(name)
    for number in (1, 2):
        before = {path.name: path.read_bytes() for path in Path("run/iter_0000008").iterdir()} if number == 1 else {}
        said = set_run_aside(Path("run"), "run/metrics.jsonl")
        aside = Path(f"run/set_aside_{number}")
        assert said is not None and said.endswith(f"of another run are in {aside} now: --load {aside} resumes that run")
        assert sorted(os.listdir("run")) == ["notes.txt", *(f"set_aside_{n + 1}" for n in range(number))]
        assert newest_complete(Path("run")).empty  # --auto-resume finds nothing: the run begins from --load again
        if number == 1:
            assert {path.name: path.read_bytes() for path in (aside / "iter_0000008").iterdir()} == before
            assert find_source(CheckpointConfig(load=str(aside))).state.iteration == 8
            assert (aside / "iter_0000002").is_dir() and {"metrics.jsonl", "progress.json"} <= {*os.listdir(aside)}
            save(Path("run"), 7, {"train": TrainState(iteration=7)}, Mesh.single(), config={})
            assert find_source(CheckpointConfig(save="run", auto_resume=True)).state.iteration == 7
    assert set_run_aside(Path("run"), None) is None and not Path("run/set_aside_3").exists()


def test_a_first_start_by_the_same_directory_twice(disk):
    """Nothing there, under whatever name; a directory that shows traces of checkpoints is not nothing."""
    for save_, load in (("new", "new"), ("new", str(disk / "new")), ("absent", "./absent/"), ("link2", "new")):
        Path("link2").unlink(missing_ok=True)
        Path("link2").symlink_to("new")
        source = find_source(CheckpointConfig(save=save_, load=load))
        assert source.directory is None and source.lines[0] == f"nothing to load in {load} yet, which is also --save"
    for name, config in (
        ("emptied", CheckpointConfig(save="emptied", load="emptied")),
        ("torn", CheckpointConfig(save="torn", load="torn")),
        ("new", CheckpointConfig(save="new", load="new", exit_on_missing_checkpoint=True)),
        ("new", CheckpointConfig(save="new", load="new", finetune=True)),
        ("absent", CheckpointConfig(save="new", load="absent")),
    ):
        with pytest.raises(Exception, match=name):
            find_source(config)


def test_both_ways_at_once_are_refused():
    assert problems("--save x --save-interval 5 --auto-resume --overwrite") == [
        "`--auto-resume` and `--overwrite` exclude each other; give one of them"
    ]


def test_overwriting_removes_the_old_run_alone_and_only_when_asked(disk):
    old, storage = CheckpointsToReplace(Path("run")), Storage()
    assert sorted(os.listdir("run")) == ["iter_0000004", "iter_0000008", "latest_checkpointed_iteration.txt"]
    Path("run/iter_0000008/notes.txt").write_text("mine")  # since then
    save(Path("run"), 4, {"train": TrainState(iteration=4)}, Mesh.single(), config={})  # the new run's, under the old name
    save(Path("run"), 6, {"train": TrainState(iteration=6)}, Mesh.single(), config={})
    old.put_aside(storage)
    assert [name for name in sorted(os.listdir("run")) if re.match(r"iter_\d+$", name)] == [
        "iter_0000004",
        "iter_0000006",
        "iter_0000008",
    ]
    Path("run/iter_0000008/notes.txt").unlink()
    old.put_aside(storage)
    assert ".iter_0000008.deleted" in os.listdir("run") and "iter_0000008" not in os.listdir("run")
    Path("other/iter_0000006/notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"other/iter_0000006/notes\.txt is not part of a checkpoint"):
        start("--save other --overwrite")


def test_metrics_of_a_run_that_is_written_over_are_kept(tmp_path):
    path, save_ = tmp_path / "metrics.jsonl", str(tmp_path)
    assert set_metrics_aside(path, save_) is None
    for text in ("a", "b"):
        path.write_text(text)
        assert "metrics.jsonl of the previous run is" in (set_metrics_aside(path, save_) or "")
    assert [(tmp_path / f"metrics.{n}.jsonl").read_text() for n in (1, 2)] == ["a", "b"] and not path.exists()
    path.write_text("c")
    assert set_metrics_aside(path, str(tmp_path / "run")) is None and path.read_text() == "c"


def test_the_command_that_goes_on():
    typed = ["python", "pretrain_gpt.py", "--save", "my run", "--overwrite"]
    assert resume_advice(typed, CheckpointConfig(save="my run", auto_resume=True)) == "start again to go on"
    assert resume_advice(typed, CheckpointConfig(save="my run", overwrite=True)) == (
        "start again with --auto-resume to go on: python pretrain_gpt.py --save 'my run' --auto-resume"
    )
    assert "without its overwrite in the file" in resume_advice(typed[:-1], CheckpointConfig(save="my run", overwrite=True))
    assert json.dumps(resume_advice(typed[:2], CheckpointConfig(save="x"))).endswith('pretrain_gpt.py --auto-resume"')
