"""A run that is asked to stop: one whole checkpoint, status 75, and a resumed run that is the uninterrupted one."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from legal_run import argv
from ranks import on_ranks

from megatron.cli.program import resume_after_restart
from megatron.config.command_line.parse import parse
from megatron.launch.environment import LaunchEnvironment
from megatron.launch.signals import StopSignals
from megatron.mesh.mesh import Mesh
from megatron.train.progress import Progress
from megatron.train.stopping import Request, Stopping

ROOT = Path(__file__).parents[2]
TIMES = ("iteration_time_ms", "tokens_per_second", "tflops_per_gpu", "mfu", "mfu_causal")


def metrics(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


@pytest.fixture
def command(flags, tmp_path):
    """The flags with another --save; an evaluation every 5 steps, of 2 steps."""

    def named(name: str, *more: object) -> list[str]:
        return [flag if flag != str(tmp_path / "run") else str(tmp_path / name) for flag in flags] + [*map(str, more)]

    return named


@pytest.fixture(scope="module")
def whole(slices, corpus, tmp_path_factory):
    """The metrics of the uninterrupted run on two ranks."""
    folder = tmp_path_factory.mktemp("whole") / "run"

    def lines(flags) -> list[dict]:
        if not folder.exists():
            assert slices([flag if not flag.endswith("/run") else str(folder) for flag in flags]).statuses == [0, 0]
        return metrics(folder)

    return lines


# rank, phase, its number, signal; the iteration of the checkpoint. The flags have evaluations after steps 5 and 10, and two at
# the end, each of two steps.
STOPS = {
    "training": ((0, "optimizer", 7, "SIGUSR1+SIGTERM+SIGUSR1"), 7),
    "Ctrl-C": ((1, "optimizer", 2, "SIGINT+SIGTERM"), 2),  # and a launcher's echo of it
    "before a save": ((1, "forward", 4, "SIGTERM"), 4),
    "saving": ((1, "save", 1, "SIGTERM"), 5),
    "model build": ((0, "model build", 1, "SIGTERM+sleep"), 1),  # longer than a cause would be looked for
    "final evaluation": ((1, "eval", 7, "SIGTERM"), 12),
}


@pytest.mark.parametrize("when", STOPS)
def test_a_stop_in_any_phase(slices, command, flags, whole, tmp_path, when):
    (rank, phase, at, how), iteration = STOPS[when]
    stopped = slices(command("split", "--auto-resume"), fault=(rank, phase, at, how))
    assert stopped.statuses == [75, 75], "although a launcher ends the others when the first one leaves"
    assert not stopped.errors and "Traceback" not in stopped.err
    line = f"stopping after iteration {iteration}: {how.split('+')[0]} to rank {rank}; checkpoint saved; start again to go on"
    assert stopped.out.count("stopping after") == 1 and line in stopped.out, stopped.out
    assert stopped.left == [line, line], "torchrun's report says the same"
    saved = re.findall(r"successfully saved checkpoint at iteration +(\d+)", stopped.out)
    assert saved == sorted(set(saved), key=int) and int(saved[-1]) == iteration, "once each"
    assert (tmp_path / "split" / "latest_checkpointed_iteration.txt").read_text().strip() == str(iteration)
    if when in ("training", "saving", "final evaluation"):
        assert slices(command("split", "--auto-resume")).statuses == [0, 0]
        assert metrics(tmp_path / "split") == whole(flags), "each line once, and all of them"


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_stop_before_the_ranks_have_joined(slices, command, tmp_path, ranks):
    """Nothing to save. The second time in a row is an error, and a step in between starts the count anew."""
    early = {"ranks": ranks, "fault": (ranks - 1, "dataset build", 1, "SIGTERM"), "launcher": False}
    first = slices(command("split"), **early)
    said = f"stopping before the first step: SIGTERM to rank {ranks - 1}; there is nothing to save; start again to go on\n"
    assert first.statuses == [75] * ranks and first.err == said and first.seconds < 60.0
    second = slices(command("split"), **early)
    assert second.statuses[ranks - 1] == 1 and "2 slices in a row ended without a step" in second.err
    assert len(second.errors) == 1
    if ranks == 1:
        assert slices(command("split", "--exit-interval", "1"), ranks=1).statuses == [75]
        assert slices(command("split", "--auto-resume"), **early).statuses == [75]


def test_a_stop_during_the_evaluation_that_is_made_up_for(slices, command, flags, whole, tmp_path):
    """Stopped in the evaluation after step 5, and again in the same one: no step in the second slice, two in the third."""
    first = slices(command("split", "--auto-resume"), fault=(1, "eval", 1, "SIGTERM"), launcher=False)
    second = slices(command("split", "--auto-resume"), fault=(0, "eval", 1, "SIGTERM"), launcher=False)
    assert first.statuses == second.statuses == [75, 75]
    assert "stopping after iteration 5: SIGTERM to rank 0; nothing new to save; start again" in second.out
    third = slices(command("split", "--auto-resume"), fault=(0, "eval", 1, "SIGTERM"), launcher=False)
    assert third.statuses == [1, 1] and "2 slices in a row ended without a step" in third.err
    assert len(third.errors) == 1
    assert slices(command("split", "--auto-resume")).statuses == [0, 0]
    assert metrics(tmp_path / "split") == whole(flags)


def test_killed_in_the_last_evaluations(slices, command, flags, whole, tmp_path):
    """The validation's line is there already, the test's is not: both are made again, and stand there once."""
    killed = slices(command("split", "--auto-resume"), fault=(0, "eval", 8, "SIGKILL"), launcher=False)
    assert killed.statuses == [-signal.SIGKILL, 1]
    assert metrics(tmp_path / "split")[-1]["split"] == "validation"
    assert slices(command("split", "--auto-resume")).statuses == [0, 0]
    assert metrics(tmp_path / "split") == whole(flags)
    again = slices(command("split", "--auto-resume"))
    assert again.statuses == [0, 0] and "nothing is left to train" in again.out


def test_a_stop_without_save_saves_nothing_and_fails(slices, command):
    ours = command("split")
    del ours[ours.index("--save") : ours.index("--save") + 2]
    del ours[ours.index("--save-interval") : ours.index("--save-interval") + 2]
    stopped = slices(ours, ranks=1, fault=(0, "forward", 3, "SIGTERM"))
    assert stopped.statuses == [1]
    (error,) = stopped.errors
    assert "after iteration 2: SIGTERM to rank 0; nothing is saved, because there is no --save" in error
    assert slices([*ours, "--exit-interval", "3"], ranks=1).statuses == [0]
    stopped = slices([*ours, "--skip-train"], ranks=1, fault=(0, "eval", 1, "SIGTERM"))
    assert stopped.statuses == [75] and "SIGTERM to rank 0; the evaluation is not finished; start again" in stopped.out


def test_a_stop_file_is_obeyed_once(slices, command, tmp_path):
    (tmp_path / "split").mkdir()
    (tmp_path / "split" / "stop").touch()
    stopped = slices(command("split", "--auto-resume"))
    assert stopped.statuses == [75, 75]
    assert f"stopping after iteration 1: the stop file {tmp_path / 'split' / 'stop'}; checkpoint saved" in stopped.out
    assert slices(command("split", "--auto-resume")).statuses == [0, 0]
    wrong = slices(command("split", "--stop-file", tmp_path), ranks=1)
    assert wrong.statuses == [2] and "is a directory, not a file" in wrong.err


def test_limits_in_minutes_stop_and_save(slices, command):
    """A slot of no length still makes a step; checkpoints by the clock need no interval."""
    short = slices(command("split", "--auto-resume", "--exit-duration-in-mins", "0.0001"))
    assert short.statuses == [75, 75]
    assert "stopping after iteration 1: --exit-duration-in-mins 0.0001; checkpoint saved" in short.out
    often = slices(command("often", "--save-interval", "100", "--save-interval-mins", "0.00001"))
    assert often.statuses == [0, 0] and often.out.count("successfully saved") == 12


def test_a_restart_by_torchrun_resumes(slices, command, flags, whole, tmp_path):
    attempts = [{"TORCHELASTIC_RUN_ID": "a", "TORCHELASTIC_RESTART_COUNT": str(count)} for count in range(2)]
    failed = slices(command("split"), fault=(1, "forward", 11, "exception"), env=attempts[0])
    # The other one ends with 0 when torchrun ends it, which would report each that does not.
    assert failed.statuses == [0, 1] and len(failed.errors) == 1
    again = slices(command("split"), env=attempts[1])
    assert again.statuses == [0, 0]
    assert "restart 1 by torchrun: resuming from the newest checkpoint of --save, as with --auto-resume" in again.out
    assert "iter_0000008" in again.out and metrics(tmp_path / "split") == whole(flags)


def test_a_restart_repeats_a_command_that_has_saved_nothing(tmp_path):
    """A checkpoint in --save from an earlier job was not asked for. A job that was stopped on request stays stopped."""
    env = LaunchEnvironment(job="b", attempt=1, launcher="torchrun")
    parsed = parse([*argv(""), "--save", str(tmp_path), "--save-interval", "5"], program="pretrain_gpt.py", check_disk=False)
    tracker = tmp_path / "latest_checkpointed_iteration.txt"
    tracker.write_text("12")
    progress = Progress(str(tmp_path))
    progress.note_start("b", 12, 0)
    assert not resume_after_restart(parsed, env).config.checkpoint.auto_resume
    tracker.write_text("15")
    progress.note_start("b", 15, 1)  # a later attempt does not move the mark
    assert resume_after_restart(parsed, env).config.checkpoint.auto_resume
    assert not resume_after_restart(parsed, replace(env, job="c")).config.checkpoint.auto_resume
    assert resume_after_restart(parsed, replace(env, attempt=0)) is parsed
    progress.write(stopped=True)
    assert resume_after_restart(parsed, env) is None and resume_after_restart(parsed, replace(env, job="c")) is not None
    Progress(str(tmp_path)).note_start("b", 15, 0)
    assert resume_after_restart(parsed, env) is not None


def test_sigterm_to_torchrun(command, flags, tmp_path):
    """With the real one, as a batch script starts it."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", ROOT / "pretrain_gpt.py"]
    with (tmp_path / "out").open("w") as out:
        job = subprocess.Popen(
            [sys.executable, *map(str, launch), *command("split", "--auto-resume", "--train-iters", "5000")],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=out,
            stderr=subprocess.STDOUT,
        )
        wait_for(tmp_path / "out", "iteration        6/")
        job.send_signal(signal.SIGTERM)
        job.wait(30)
    text = (tmp_path / "out").read_text()
    (iteration,) = re.findall(r"^stopping after iteration (\d+): SIGTERM to rank [01]; checkpoint saved", text, re.MULTILINE)
    assert (tmp_path / "split" / "latest_checkpointed_iteration.txt").read_text().strip() == iteration


def wait_for(path: Path, text: str) -> None:
    deadline = time.monotonic() + 60.0
    while text not in path.read_text():
        assert time.monotonic() < deadline, path.read_text()
        time.sleep(0.05)


# Without a run.


@pytest.mark.parametrize("before", [signal.SIG_DFL, signal.SIG_IGN])
def test_signals_are_noted_while_the_main_thread_is_blocked(before):
    """Also one that a batch script ignores, which its processes inherit."""
    old = signal.signal(signal.SIGUSR1, before)
    signals = StopSignals()
    signals.install()
    assert signal.getsignal(signal.SIGUSR1) is not before, "not taken over: the signal would end pytest"
    noted: list[bool] = []

    def kill_and_look() -> None:
        time.sleep(0.1)  # the main thread is in the call by now
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(0.2)
        noted.append(not through and signals.name == "SIGUSR1")

    through: list[bytes] = []
    other = threading.Thread(target=kill_and_look)
    try:
        other.start()
        through.append(hashlib.pbkdf2_hmac("sha256", b"a call that returns", b"to no Python code", 2_000_000))
        other.join()
        assert noted == [True]
    finally:
        signals.close()
        assert signal.signal(signal.SIGUSR1, old) is before


def test_a_signal_that_means_something_else_is_left_alone():
    old = signal.signal(signal.SIGTERM, handler := lambda number, frame: None)
    signals = StopSignals()
    signals.install()
    assert signal.getsignal(signal.SIGTERM) is handler
    signals.close()
    assert signal.signal(signal.SIGTERM, old) is handler


class FakeSignals(StopSignals):
    """Signals of which one has come, or none."""

    def __init__(self, name: str | None) -> None:
        super().__init__()
        self.name = name


def settings(*flags: str):
    needed = "--num-layers 2 --hidden-size 32 --num-attention-heads 2 --seq-length 32 --max-position-embeddings 32"
    needed += " --micro-batch-size 1 --train-iters 9 --lr 1e-3 --tokenizer-type ByteTokenizer --data-path x"
    needed += " --save /tmp/nowhere --save-interval 5"
    config = parse(needed.split(), program="p", defaults={}, world_size=1, check_disk=False).config
    values = dict(zip(flags[::2], flags[1::2], strict=True))
    minutes = values.get("minutes")
    batch = replace(config.batch, exit_duration_in_mins=None if minutes is None else float(minutes))
    return replace(config, batch=batch, checkpoint=replace(config.checkpoint, async_save="async" in values))


def stopping(config, *, mesh=None, name=None, saves=0.0, ends_in=None) -> Stopping:
    environ = {} if ends_in is None else {"SLURM_JOB_END_TIME": str(int(time.time() + ends_in))}
    began, device = time.monotonic(), torch.device("cpu")
    return Stopping(
        config, mesh or Mesh.single(), device, FakeSignals(name), began=began, save_seconds=lambda: saves, environ=environ
    )


def asked_by_one(name: str, which: int) -> Request:
    import torch.distributed as dist

    from megatron.mesh.grid import Grid

    rank, size = dist.get_rank(), dist.get_world_size()
    mesh = Mesh.build(Grid(dp=size), rank)
    return stopping(settings(), mesh=mesh, name=name if rank >= which else None).ask(0.1)


@pytest.mark.parametrize(("name", "which"), [("SIGTERM", 0), ("SIGUSR1", 1), ("SIGTERM", 3)])
def test_all_ranks_agree_on_the_lowest_that_was_asked(name, which):
    wanted = Request(f"{name} to rank {which}", outside=True, save=True)
    assert on_ranks(4, asked_by_one, name, which) == [wanted] * 4


@pytest.mark.parametrize(
    ("left", "step", "saves", "save_due", "mode", "stops"),
    [
        (60.0, 10.0, 20.0, False, "sync", False),  # 10 + 30 before the end
        (60.0, 31.0, 20.0, False, "sync", True),
        (60.0, 10.0, 34.0, False, "sync", True),
        (60.0, 10.0, 21.0, True, "sync", True),  # the save that is due, then a step, then the last save
        (60.0, 10.0, 21.0, False, "async", True),  # one may be under way
        (4.0, 0.1, 0.0, False, "sync", True),
        (9.0, 0.1, 0.0, False, "sync", False),
    ],
)
def test_room_is_left_before_a_limit(left, step, saves, save_due, mode, stops):
    slurm = stopping(settings(mode, "1"), saves=saves, ends_in=left).ask(step, save_due=save_due)
    assert slurm.stop == ("the time limit of the SLURM job is near" if stops else None)
    if left > 10.0:
        own = stopping(settings(mode, "1", "minutes", str(left / 60)), saves=saves).ask(step, save_due=save_due)
        assert (own.stop is not None) is stops and not own.outside


def test_between_the_steps_of_an_evaluation_the_last_step_counts():
    asked = stopping(settings(), ends_in=30.0)
    assert asked.ask(1.0).stop is None and asked.ask().stop is None
    assert asked.ask(30.5).stop is not None and asked.ask().stop is not None


@pytest.mark.parametrize("text", ["", "[]", "{", '{"finished": "x", "slices_without_a_step": -3}', '{"finished": true}'])
def test_a_progress_file_of_any_content(tmp_path, text):
    (tmp_path / "progress.json").write_text(text)
    progress = Progress(str(tmp_path))
    assert progress.finished is None and progress.idle == 0 and progress.idle_error("why") is None


def test_a_disk_that_takes_no_progress_file(tmp_path):
    (tmp_path / "file").touch()
    Progress(str(tmp_path / "file" / "run")).write(idle=1)
    Progress(None).write(idle=1)
