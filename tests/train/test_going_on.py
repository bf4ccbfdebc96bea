"""Starting the same command again: from nothing, from what a stop or Ctrl-C left, beside a run that still lives."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.cli.program import pretrain
from megatron.launch.command_line import typed_command
from megatron.launch.environment import LaunchEnvironment
from megatron.launch.heartbeat import Process
from megatron.train.ending import Exit
from megatron.train.lock import LOCK_FILE, LockHolder

NOTE = "which is also --save"


def run(flags) -> int:
    return pretrain([*map(str, flags)], program="pretrain_gpt.py", defaults={})


def iterations(folder: Path) -> list[int]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["iteration"] for line in lines if "split" not in line]


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def short(flags):
    return [*flags, "--train-iters", "4", "--eval-iters", "0", "--save-interval", "2"]


def test_a_command_with_save_and_load_alike_begins_and_goes_on(short, tmp_path, capsys):
    """As NVIDIA's scripts are; the first start may be killed before it has saved."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"iteration": 1, "lm_loss": 9.0}\n')  # of a start that was killed
    same = [*short, "--load", tmp_path / "." / "run"]
    assert run([*same, "--exit-interval", "2"]) == Exit.STOPPED
    out = capsys.readouterr().out
    assert NOTE in out and "starting fresh" in out
    assert run(same) == 0
    out = capsys.readouterr().out
    assert "iter_0000002: weights with optimizer" in out and NOTE not in out and "WARNING" not in out
    assert iterations(tmp_path / "run") == [1, 2, 3, 4]
    assert sorted(p.name for p in (tmp_path / "run").iterdir())[:2] == ["iter_0000002", "iter_0000004"], "no lock is left"


def test_the_stop_line_is_the_command_that_goes_on(short, tmp_path, capsys):
    assert run([*short, "--exit-interval", "2"]) == Exit.STOPPED
    (typed,) = re.findall(r"; start again with --auto-resume to go on: pretrain_gpt\.py (.*)$", capsys.readouterr().out, re.M)
    assert shlex.split(typed) == [*map(str, short), "--exit-interval", "2", "--auto-resume"]
    assert run([*short, "--exit-interval", "2"]) == 2, "the same command would begin anew"
    assert "contains checkpoints already" in capsys.readouterr().err
    assert run([word for word in shlex.split(typed)]) == 0
    assert iterations(tmp_path / "run") == [1, 2, 3, 4]
    assert run([*short, "--overwrite", "--exit-interval", "2"]) == Exit.STOPPED
    said = capsys.readouterr().out
    assert "--overwrite: the checkpoints of iterations 2, 4 in" in said and " --exit-interval 2 --auto-resume" in said
    assert "--overwrite" not in said.splitlines()[-1]
    assert sorted(p.name for p in (tmp_path / "run").glob("iter_*")) == ["iter_0000002"], "4 was the old run's"


def test_a_run_from_elsewhere_sets_the_other_aside_and_is_gone_on_with_alone(short, tmp_path, capsys):
    assert run(short) == 0
    assert run([*short, "--save", tmp_path / "other", "--exit-interval", "2"]) == Exit.STOPPED
    before = content(tmp_path / "run" / "iter_0000004")
    capsys.readouterr()
    assert run([*short, "--load", tmp_path / "other", "--exit-interval", "3"]) == Exit.STOPPED
    said, aside = capsys.readouterr().out, tmp_path / "run" / "set_aside_1"
    assert (
        said.count("note: ") == 1 and f"note: {tmp_path}/run contains the checkpoints of iterations 2, 4 of another run" in said
    )
    assert f"the checkpoints of iterations 2, 4 of another run are in {aside} now" in said
    assert iterations(aside) == [1, 2, 3, 4] and iterations(tmp_path / "run") == [3]
    assert content(aside / "iter_0000004") == before
    assert run([*short, "--load", tmp_path / "other", "--auto-resume"]) == 0
    assert "run/iter_0000003: weights with optimizer" in capsys.readouterr().out
    assert [p.name for p in sorted((tmp_path / "run").glob("iter_*"))] == ["iter_0000003", "iter_0000004"]


def test_an_extended_run_is_asked_for_its_schedule_and_never_trains_at_rate_zero_in_silence(short, tmp_path, capsys):
    assert run(short) == 0
    longer = [*short, "--train-iters", "6", "--auto-resume"]
    assert run(longer) == 2
    error = capsys.readouterr().err
    assert "(`--train-iters 6` x `--global-batch-size 4`) is 24; the schedule of" in error and "has 16" in error
    assert run([*longer, "--use-checkpoint-opt_param-scheduler", "--exit-interval", "5"]) == Exit.STOPPED
    assert capsys.readouterr().out.count("WARNING: learning rate 0, nothing is learnt: iterations 5 to 6 lie beyond") == 1
    assert run([*longer, "--use-checkpoint-opt_param-scheduler"]) == 0
    out = capsys.readouterr().out
    assert out.count("WARNING: learning rate 0, nothing is learnt: iteration 6 lies beyond") == 2, "at its begin and its end"
    assert "order of samples" not in out


def test_ctrl_c_a_second_time(slices, short, tmp_path):
    ended = slices(short, ranks=1, fault=(0, "backward", 5, "SIGINT+SIGINT"))
    assert ended.statuses == [130]
    first, second = ended.err.splitlines()
    assert first == "Ctrl-C: stopping at the end of this step, saving a checkpoint; a second Ctrl-C ends at once"
    kept = f"{tmp_path}/run contains the checkpoint of iteration 2; start again with --auto-resume to go on: pretrain_gpt.py "
    assert second.startswith(f"ended at once by a second Ctrl-C (SIGINT); {kept}")
    assert slices([*short, "--auto-resume"], ranks=1).statuses == [0]


def test_ctrl_c_twice_by_torchrun(slices, short, tmp_path):
    """The second one reaches the ranks as SIGTERM; before anything was saved, and the second time without --save."""
    relayed = {"RANK": "0", "WORLD_SIZE": "1"}
    command = ["--save-interval", "3"]
    ended = slices([*short, *command], fault=(0, "backward", 1, "SIGINT+sleep+SIGTERM"), launcher=False)
    assert ended.statuses[0] == 130 and "torchrun kills a process that has not ended in half a minute" in ended.err
    assert f"second Ctrl-C (SIGTERM); nothing is saved: no checkpoint was finished in {tmp_path / 'run'}\n" in ended.err
    del short[short.index("--save") : short.index("--save") + 2]
    ended = slices(short, ranks=1, fault=(0, "backward", 1, "SIGINT+SIGINT"), env=relayed)
    assert ended.statuses == [130] and "nothing is saved, because there is no --save\n" in ended.err
    ended = slices(short, ranks=1, fault=(0, "backward", 1, "SIGINT"))
    assert ended.statuses == [1] and "SIGINT to rank 0; nothing is saved, because there is no --save" in ended.err


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_second_run_at_once_is_refused(slices, short, tmp_path, ranks):
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    (tmp_path / "run").mkdir()
    text = LockHolder("2026-01-01 10:00:00", (Process.here(other.pid),)).to_text()
    (tmp_path / "run" / LOCK_FILE).write_text(text)
    try:
        ended = slices([*short, "--auto-resume"], ranks=ranks, launcher=False)
        assert ended.statuses == [2] * ranks and len(ended.errors) == 1
        assert (
            f"is in use by another run, process {other.pid} on host " in ended.err and "since 2026-01-01 10:00:00" in ended.err
        )
        assert (tmp_path / "run" / LOCK_FILE).read_text() == text
    finally:
        other.communicate()
    assert ranks == 2 or slices([*short, "--auto-resume"], ranks=ranks).statuses == [0]


def test_the_command_as_it_was_typed(monkeypatch):
    argv = ["--lr", "1", "--save", "x y"]
    monkeypatch.setattr(sys, "orig_argv", ["python", "-u", "pretrain_gpt.py", *argv])
    assert typed_command("p.py", argv, LaunchEnvironment()) == ["python", "-u", "pretrain_gpt.py", *argv]
    assert typed_command("p.py", argv, LaunchEnvironment(launcher="srun"))[:2] == ["srun", "python"]
    assert typed_command("p.py", argv, LaunchEnvironment(launcher="torchrun")) == ["p.py", *argv], "this parent is no torchrun"
    assert typed_command("p.py", ["--lr", "2"], LaunchEnvironment()) == ["p.py", "--lr", "2"]
