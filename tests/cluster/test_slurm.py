"""The batch scripts of examples/slurm on a real SLURM: preempted, stopped by the time limit, and at the end nothing shows it.

A cluster of two nodes is looked for with `sinfo`; without one these tests are skipped.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ITERATIONS = 120
FLAGS = f"--train-iters {ITERATIONS} --save-interval 50 --eval-interval 40".split()
# pretrain_gpt.py, but while the file PACE is there each step takes a third of a second longer.
PROGRAM = """
import os, sys, time
sys.path.insert(0, os.getcwd())
from megatron.cli.program import pretrain
from megatron.train.step import Step
plain = Step.__call__
def paced(step, *args):
    time.sleep(0.3 * os.path.exists(os.environ["PACE"]))
    return plain(step, *args)
Step.__call__ = paced
sys.exit(pretrain(sys.argv[1:], program="pretrain_gpt.py", defaults={}))
"""


def slurm(*command: str) -> str:
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=60).stdout.strip()


@pytest.fixture(scope="module")
def cluster() -> None:
    """Two nodes that are idle."""
    if shutil.which("sinfo") is None:
        pytest.skip("SLURM is not installed")
    try:
        found = slurm("sinfo", "--noheader", "--Node", "--format", "%T").split()
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        pytest.skip(f"no SLURM answers: {error.stderr}")
    if found.count("idle") < 2:
        pytest.skip(f"SLURM has no two idle nodes: {found}")


class SlurmJob:
    """A job of one of the scripts. variables: of its environment, beside those that every job here has."""

    def __init__(self, script: str, folder: Path, flags: list[str], *options: str, **variables: Path) -> None:
        self.save, self.log = folder / "save", folder / "job.log"
        own = {"SAVE": self.save, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **variables}
        done = subprocess.run(
            ["sbatch", "--parsable", f"--output={self.log}", *options, f"examples/slurm/{script}", *flags],
            cwd=ROOT,
            env={**os.environ, **{name: str(value) for name, value in own.items()}},
            check=True,
            capture_output=True,
            text=True,
        )
        self.id = done.stdout.strip()

    def state(self) -> str:
        found = re.search(r"JobState=(\w+)", slurm("scontrol", "show", "job", self.id))
        assert found is not None
        return found[1]

    def said(self) -> str:
        """The output of the script and of the nodes."""
        return "\n".join(path.read_text() for path in [self.log, *sorted(self.save.glob("logs/*"))] if path.exists())

    def wait(self, condition, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"{self.state()}\n{self.said()[-5000:]}"
            time.sleep(0.2)

    def wait_requeued(self, seconds: float) -> None:
        self.wait(lambda: self.state() == "PENDING", seconds)

    def start_now(self, *changes: str) -> None:
        """SLURM waits two minutes before it starts a requeued job again; two seconds do for its old credential to expire."""
        time.sleep(2.0)
        slurm("scontrol", "update", f"JobId={self.id}", "StartTime=now", *changes)
        self.wait(lambda: self.state() == "RUNNING", 60.0)

    def wait_ended(self, state: str) -> None:
        self.wait(lambda: self.state() not in ("PENDING", "RUNNING", "COMPLETING"), 90.0)
        assert self.state() == state, self.said()[-5000:]


@pytest.fixture
def submit(cluster: None, tmp_path: Path) -> Iterator:
    jobs: list[SlurmJob] = []

    def start(script: str, flags: list[str], *options: str, **variables: Path) -> SlurmJob:
        jobs.append(SlurmJob(script, tmp_path, flags, *options, **variables))
        return jobs[-1]

    yield start
    for job in jobs:
        slurm("scancel", job.id)


@pytest.fixture
def pace(tmp_path: Path) -> Path:
    """A paced job trains slowly while this is there."""
    path = tmp_path / "pace"
    path.touch()
    return path


@pytest.fixture
def submit_paced(submit, pace: Path, tiny: list[str], tmp_path: Path):
    """Submits a paced GPT."""
    program = tmp_path / "paced.py"
    program.write_text(PROGRAM)

    def start(script: str, *options: str, flags: tuple[str, ...] = ()) -> SlurmJob:
        return submit(script, [*tiny, *FLAGS, *flags], *options, PROGRAM=program, PACE=pace)

    return start


@pytest.fixture(scope="module")
def expected(cluster: None, alone, tiny, lines):
    """The lines of the uninterrupted run, asked for when they are needed."""
    process, save = alone("pretrain_gpt.py", *tiny, *FLAGS)

    def wait() -> list[dict[str, object]]:
        assert process.wait(timeout=120.0) == 0
        return lines.read(save)

    return wait


def test_preempted_and_out_of_time(submit_paced, pace, expected, lines):
    """With torchrun. `scontrol requeue` does what a preemption does; then comes the warning before a time limit of a minute."""
    job = submit_paced("pretrain_gpt.sbatch", "--time=10", "--signal=B:USR1@15")
    job.wait(lambda: lines.iteration(job.save) >= 5, 90.0)
    slurm("scontrol", "requeue", job.id)
    job.wait_requeued(30.0)
    preempted = lines.iteration(job.save)
    assert f"stopping after iteration {preempted}: SIGTERM to rank 0; checkpoint saved" in job.said()
    job.start_now("TimeLimit=1")
    job.wait_requeued(90.0)
    late = lines.iteration(job.save)
    assert f"stopping after iteration {late}: the stop file {job.save}/stop; checkpoint saved" in job.said()
    assert f"attempt {job.id}.1 ended with status 75" in job.said()
    assert preempted < late < ITERATIONS, "it went on, and was not at its end"
    job.start_now("TimeLimit=10")
    pace.unlink()
    job.wait_ended("COMPLETED")
    for iteration in (preempted, late):
        assert f"loading checkpoint {job.save}/iter_{iteration:07d}: " in job.said()
    assert lines.read(job.save) == expected()
    logs = [path.name.rpartition("-")[0] for path in (job.save / "logs").iterdir()]
    assert sorted(logs) == [f"{job.id}.{attempt}-{node}" for attempt in (0, 1, 2) for node in (0, 1)], "one of each node"


def test_a_preempted_srun_job_without_torchrun_goes_on(submit_paced, pace, expected, lines):
    """The warning goes to the ranks themselves; their exit status 75 comes through srun."""
    job = submit_paced("pretrain_gpt_srun.sbatch")
    job.wait(lambda: lines.iteration(job.save) >= 5, 60.0)
    slurm("scancel", "--signal=USR1", job.id)
    job.wait_requeued(30.0)
    assert re.search(r"stopping after iteration \d+: SIGUSR1 to rank 0", job.said())
    job.start_now()
    pace.unlink()
    job.wait_ended("COMPLETED")
    assert f"attempt {job.id}.0 ended with status 75" in job.said() and f"attempt {job.id}.1 ended with status 0" in job.said()
    assert lines.read(job.save) == expected()


@pytest.mark.parametrize("script", ["pretrain_bert.sbatch", "pretrain_bert_srun.sbatch"])
def test_a_bert_job_in_two_attempts_equals_one_run(script, submit, tiny_bert, alone, lines):
    """In two attempts what one process group does in one; --exit-interval ends the first as a time limit would."""
    flags = [*tiny_bert, "--train-iters", "12", "--save-interval", "50", "--eval-interval", "4"]
    job = submit(script, [*flags, "--exit-interval", "8"])
    process, save = alone("pretrain_bert.py", *flags)
    job.wait(lambda: lines.iteration(job.save) >= 8, 90.0)
    job.wait_requeued(30.0)
    assert lines.iteration(job.save) == 8
    job.start_now()
    job.wait_ended("COMPLETED")
    assert process.wait(timeout=120.0) == 0
    assert lines.read(job.save) == lines.read(save)
    assert all("sop_loss" in line for line in lines.read(job.save))
    logs = {path.name.rpartition("-")[0] for path in (job.save / "logs").iterdir()}
    assert logs == {f"{job.id}.{attempt}-{node}" for attempt in (0, 1) for node in (0, 1)}, "one of each node"


def test_a_failure_is_not_repeated(submit_paced):
    """A mistake in the command: the job ends with its status, and is not put back."""
    job = submit_paced("pretrain_gpt.sbatch", flags=("--hidden-size", "31"))
    job.wait_ended("FAILED")
    assert "hidden-size" in job.said() and f"attempt {job.id}.0 ended with status 1\n" in job.said()
