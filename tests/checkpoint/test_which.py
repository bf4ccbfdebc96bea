"""Choice of a directory's checkpoint: one rule, for every program and tool, that no copy and no time stamp changes."""

import os
import re
import runpy
import shutil
import signal
import sys
from inspect import signature
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from archives import build, named_weights, small_config
from crashes import FaultyStorage, count_steps, kill_itself, run_in_forks, save_once

from megatron.checkpoint.layout import NewestCheckpoint, latest_iteration, newest_complete, read_tracker
from megatron.config.schema import CheckpointConfig, RunSettings
from megatron.data.tokenizer import ByteTokenizer
from megatron.interop.whole_tensors import write_weights
from megatron.train.resume import find_source

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    """A killed process loses no written byte, so nobody waits for the disk."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def test_the_newest_of_a_run_that_was_wound_back(tmp_path):
    """Saved 300, went back to 100, saved 200: 200 is the newest. But one finished after the tracker was written counts."""
    tracker = tmp_path / "latest_checkpointed_iteration.txt"
    for n in (300, 200):
        save_once(tmp_path, n)
    newest = newest_complete(tmp_path)
    assert newest.path == tmp_path / "iter_0000200" and not newest.skipped
    assert re.search("names iteration 200; 300 is later, and not taken: .*--load-iteration", newest.note)
    # Killed at its very last step: the directory has its name, the tracker is the old one.
    assert run_in_forks(1, lambda rank: save_once(tmp_path, 400, FaultyStorage(last_rename(400), kill_itself))) == [
        -signal.SIGKILL
    ]
    assert read_tracker(tmp_path) == 200 and latest_iteration(tmp_path) == 400
    copy_without_times(tmp_path, tmp_path / "copy")
    for root in (tmp_path, tmp_path / "copy"):
        newest = newest_complete(root)
        assert newest.path == root / "iter_0000400" and "iteration 200; the save of 400 was finished after it" in newest.note
    tracker.write_text("")
    newest = newest_complete(tmp_path)
    assert newest.path == tmp_path / "iter_0000400" and "expected an iteration number, found ''" in newest.skipped[0]
    save_once(tmp_path, 500)
    assert newest_complete(tmp_path) == NewestCheckpoint(tmp_path / "iter_0000500", ())


def last_rename(iteration):
    """The step before the tracker is replaced."""
    with TemporaryDirectory() as name:
        storage, steps = FaultyStorage(), []
        rename = storage.rename
        storage.rename = lambda source, target: (steps.append(storage.steps), rename(source, target))
        save_once(Path(name), iteration, storage)
        return steps[-1]


def copy_without_times(root, target):
    """As by a copy that keeps no time stamps: here the tracker is the oldest."""
    shutil.copytree(root, target, copy_function=shutil.copy)
    for age, path in enumerate(sorted(target.rglob("*"), reverse=True)):
        os.utime(path, (1e9 - age, 1e9 - age))
    os.utime(target / "latest_checkpointed_iteration.txt", (0, 0))


def test_an_older_number_in_the_tracker_is_the_way_back(tmp_path):
    """Megatron-LM's. Time stamps say nothing."""
    for n in (100, 200, 300):
        save_once(tmp_path, n)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("100\n")
    copy_without_times(tmp_path, tmp_path / "copy")
    for root in (tmp_path, tmp_path / "copy"):
        newest = newest_complete(root)
        assert newest.path == root / "iter_0000100" and "names iteration 100; 200, 300 are later, and not taken" in newest.note
    # All later ones are better than none, and are taken last.
    shutil.rmtree(tmp_path / "iter_0000100")
    newest = newest_complete(tmp_path)
    assert newest.path == tmp_path / "iter_0000300" and newest.note is None
    assert newest.skipped == (f"{tmp_path}/latest_checkpointed_iteration.txt: it names iteration 100, which is not there",)


def test_a_next_tracker_alone_announces_nothing(tmp_path):
    """It was torn, its directory never had its name, or an older save of the same iteration has it still."""
    for n in (30, 200, 300):
        save_once(tmp_path, n)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("200\n")
    pending = tmp_path / ".latest_checkpointed_iteration.txt.tmp"
    for text in ("30", "400\n", "", "x\n"):
        pending.write_text(text)
        assert newest_complete(tmp_path).path == tmp_path / "iter_0000200"
    pending.unlink()
    # A second save of 300, killed at each of its steps: until it has the name, the first is not what was announced.
    last = count_steps(tmp_path / "count", 300)
    for step in range(last - 12, last + 4):  # all of its renames
        copy_without_times(tmp_path, tmp_path / "copy")
        run_in_forks(
            1, lambda rank, step=step: save_once(tmp_path / "copy", 300, FaultyStorage(step, kill_itself), keep_last=5)
        )
        newest = newest_complete(tmp_path / "copy").path
        second = (tmp_path / "copy" / "iter_0000300.replaced").exists() and (tmp_path / "copy" / "iter_0000300").exists()
        done = read_tracker(tmp_path / "copy") == 300
        assert newest.name == ("iter_0000300" if second or done else "iter_0000200"), step
        shutil.rmtree(tmp_path / "copy")


def test_every_program_and_tool_takes_the_same_one(tmp_path, monkeypatch, capsys):
    """And says in a line that a later one is there."""
    run, config = tmp_path / "run", small_config(vocab_size=257)
    for iteration in (1, 2):
        words = ByteTokenizer()
        write_weights(run, iteration, RunSettings(model=config), named_weights(build(config)), assets=words.files())
    (run / "latest_checkpointed_iteration.txt").write_text("1\n")
    source = find_source(CheckpointConfig(load=str(run), finetune=True))
    assert source.directory == run / "iter_0000001" and any("names iteration 1; 2 is later" in line for line in source.lines)
    for name, arguments in {
        "inspect_checkpoint.py": [run],
        "verify_checkpoint.py": [run],
        "export_hf.py": ["--load", run, "--output", tmp_path / "hf", "--no-verify"],
        "export_megatron.py": ["--load", run, "--save", tmp_path / "megatron"],
        "generate.py": ["--load", run, "--prompt", "a", "--max-new-tokens", 1],
    }.items():
        argv = list(map(str, arguments))
        monkeypatch.setattr(sys, "argv", [name, *argv])
        main = runpy.run_path(str(TOOLS / name))["main"]
        assert (main(argv) if signature(main).parameters else main()) == 0
        said = capsys.readouterr()
        assert "names iteration 1; 2 is later, and not taken: give --load-iteration" in said.out + said.err
        assert name == "generate.py" or f"{run}/iter_0000001" in said.out
