"""A rank that dies or hangs ends all ranks, and one line says which rank, where, and what it did."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from types import MappingProxyType

import pytest

from megatron.launch.environment import LaunchEnvironment
from megatron.launch.exit_report import is_secondary_error
from megatron.launch.heartbeat import DurationTracker, Heartbeat, Peer, Process, WatchdogTimeouts, may_wait_for_peer
from megatron.launch.watchdog import JobWatchdog

ROOT = Path(__file__).parents[2]
PROGRAM = Path(__file__).parent / "watched_job.py"
RANKS = 3
WARM = os.environ["WARM_PYTHON"]
HOST = os.uname().nodename
WHERE = f"rank 1 on host {HOST}, stage 1, forward of micro-batch 3: "


@dataclass
class StartedJob:
    """A job: the process that started the ranks, and the directory where they leave marks."""

    launcher: subprocess.Popen[str]
    marks: Path
    statuses: str = ""

    def ready(self) -> None:
        deadline = time.monotonic() + 60.0
        while not (self.marks / "ready").exists():
            assert time.monotonic() < deadline, "the job did not get there"
            time.sleep(0.05)

    def pids(self) -> list[int]:
        return [int((self.marks / f"pid{rank}").read_text()) for rank in range(RANKS)]

    def ended(self, within: float) -> str:
        """The combined stderr, when all ranks and the launcher have ended in time."""
        deadline = time.monotonic() + within
        self.statuses, text = self.launcher.communicate(timeout=within)
        while any(map(is_alive, self.pids())):
            assert time.monotonic() < deadline, "a rank is still there"
            time.sleep(0.05)
        return text


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


class JobStarter:
    """Starts jobs; `clean` leaves nothing of them."""

    def __init__(self, marks: Path) -> None:
        self.marks, self.jobs = marks, []

    def torchrun(self, fault: str, *flags: str, python: str = WARM) -> StartedJob:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS), *flags]
        return self._start(*launcher, fault=fault, python=python)

    def srun(self, fault: str) -> StartedJob:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        return self._start(fault=fault, environment={"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port})

    def _start(
        self, *launcher: str, fault: str, environment: Mapping[str, str] = MappingProxyType({}), python: str = WARM
    ) -> StartedJob:
        path = {} if python == WARM else {"PYTHONPATH": str(ROOT)}  # which would make a start of its own
        process = subprocess.Popen(
            [python, *launcher, str(PROGRAM), fault, str(self.marks)],
            env=os.environ | {"OMP_NUM_THREADS": "1"} | path | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.jobs.append(StartedJob(process, self.marks))
        return self.jobs[-1]

    def clean(self) -> None:
        for job in self.jobs:
            job.launcher.kill()
            job.launcher.wait()
        for mark in self.marks.glob("pid*"):
            if is_alive(pid := int(mark.read_text())):
                os.kill(pid, signal.SIGKILL)


@pytest.fixture
def start(tmp_path) -> Iterator[JobStarter]:
    starter = JobStarter(tmp_path)
    yield starter
    starter.clean()


def errors(text: str) -> list[str]:
    return [line.partition("error: ")[2] for line in text.splitlines() if line.startswith("error: ")]


FAULTS = {
    "kill": r"its process died without a message .*, \d\.\d s after its last heartbeat",
    "raise": "ValueError: boom on two lines",
    "known": "in words",
    "terminate": "ended by SIGTERM, which other ranks did not receive",
    "in-collective": r"hangs: it has taken 5 s, the longest so far took \d\.\d\d s "
    r"\(--hang-timeout-seconds\); its main thread is at:",
    "stop": r"no heartbeat for 3 s: its process is stopped \(SIGSTOP\)",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_one_failing_rank_ends_the_job_with_its_error(start, fault):
    under_torchrun = fault in ("kill", "raise")
    # Of what runs on forks of a process that has torch, one job shows that nothing hangs on that.
    python = sys.executable if fault == "kill" else WARM
    job = start.torchrun(fault, python=python) if under_torchrun else start.srun(fault)
    job.ready()
    text = job.ended(within=30.0)
    own = {"kill": -signal.SIGKILL, "stop": -signal.SIGKILL, "terminate": 128 + signal.SIGTERM}.get(fault, 1)
    assert job.launcher.returncode == 1 if under_torchrun else job.statuses.split() == ["1", str(own), "1"]
    assert len(errors(text)) == 1, text
    assert re.fullmatch(re.escape(WHERE) + FAULTS[fault], errors(text)[0]), text
    assert text.count("    do_fault(fault, env, marks)") == (fault in ("raise", "in-collective")), "its stack, and no other's"


def test_a_hang_ends_within_half_a_minute(start):
    """With the limits that users have, from the hang to the end of the last rank."""
    job = start.srun("sleep")
    job.ready()
    began = time.monotonic()
    text = job.ended(within=30.0)
    assert time.monotonic() - began > 19.0, "an action that takes a little longer than usual is no hang"
    (error,) = errors(text)
    assert error.startswith(WHERE + "hangs: it has taken 20 s") and "time.sleep(1000.0)" in text


def test_the_same_error_on_all_ranks_is_told_once(start):
    (error,) = errors(start.srun("all-raise").ended(within=60.0))
    assert re.fullmatch(r"rank \d on host \S+, stage \d, forward of micro-batch 3: in words", error)


@pytest.mark.parametrize(("fault", "status", "said"), [("exit", 7, ""), ("interrupt", 130, "interrupted\n")])
def test_a_rank_leaves_with_a_status_of_its_own(start, fault, status, said):
    job = start.srun(fault)
    job.ready()
    assert job.ended(within=30.0) == said
    assert job.statuses.split() == ["1", str(status), "1"]


def test_the_end_of_a_job_is_silent(start):
    """Ranks may finish at different times, also the one that serves the store."""
    job = start.srun("late")
    assert job.ended(within=60.0) == ""
    assert job.statuses.split() == ["0"] * RANKS


def test_sigterm_to_all_ranks(start):
    """Stopping a job is no failure of it."""
    job = start.srun("outside")
    job.ready()
    for pid in job.pids():
        os.kill(pid, signal.SIGTERM)
    assert job.ended(within=30.0) == ""
    assert job.statuses.split() == [str(128 + signal.SIGTERM)] * RANKS


def test_the_rank_that_serves_the_store_dies(start):
    job = start.srun("outside")
    job.ready()
    os.kill(job.pids()[0], signal.SIGKILL)
    text = job.ended(within=30.0)
    (error,) = errors(text)
    assert error.startswith(f"rank 0 on host {HOST}, "), text
    assert job.statuses.split() == [str(-signal.SIGKILL), "1", "1"]


def test_the_launcher_freezes(start):
    """A store that never answers: no operation on it ends, so another thread must."""
    job = start.torchrun("outside", python=sys.executable)  # torchrun itself, not a stand-in, gets the signal
    job.ready()
    job.launcher.send_signal(signal.SIGSTOP)
    deadline = time.monotonic() + 15.0
    while any(map(is_alive, job.pids())):
        assert time.monotonic() < deadline, "a rank is still there"
        time.sleep(0.1)
    job.launcher.kill()
    (error,) = errors(job.launcher.communicate()[1])
    assert re.match(r"lost the connection to the job's store at \S+:\d+, on host \S+ \(no answer for 3 s\)", error)


def test_a_second_attempt_does_not_see_the_failure_of_the_first(start):
    job = start.torchrun("restart", "--max-restarts", "1")
    assert errors(job.ended(within=90.0)) == [WHERE + "ValueError: only once"]
    assert job.launcher.returncode == 0


# Without processes.

HERE = Process.own()
FAR = Process("elsewhere", "another space", 1, 1)
GONE = replace(HERE, started=HERE.started - 1)  # the number is used again


def test_the_limit_of_a_computation():
    assert DurationTracker(hang=20.0, timeout=600.0).limit("F") == 20.0
    pace = DurationTracker(hang=20.0, timeout=600.0, first=1000.0)
    assert pace.limit("F") == 600.0, "the first one compiles"
    pace.record("F", 60.0)
    assert pace.limit("F") == 180.0 and pace.limit("B") == 600.0
    pace.record("F", 0.1)
    assert pace.limit("F") == 20.0, "what the first took says nothing about the others"
    pace.record("F", 9.0)
    pace.record("F", 0.1)
    assert pace.limit("F") == 27.0
    pace.record("F", 300.0)
    assert pace.limit("F") == 600.0


@pytest.mark.parametrize(
    ("process", "quiet", "failure_suspected", "word"),
    [
        (HERE, 9.0, False, None),
        (HERE, 9.0, True, None),
        (HERE, 10.0, False, "frozen"),
        (GONE, 0.0, False, "died"),
        (FAR, 9.0, False, None),
        (FAR, 2.0, True, "host is unreachable"),
        (FAR, 10.0, False, "host is unreachable"),
    ],
)
def test_what_is_wrong_with_a_rank(process, quiet, failure_suspected, word):
    timeouts = WatchdogTimeouts()
    problem = Peer(Heartbeat(process), quiet).problem(timeouts, HERE, failure_suspected=failure_suspected)
    assert problem is None if word is None else word in problem
    finished = Peer(Heartbeat(process, ending="finished"), quiet)
    assert finished.problem(timeouts, HERE, failure_suspected=failure_suspected) is None


def test_silence_counts_from_the_last_new_beat():
    peer = Peer(Heartbeat(HERE, number=1))
    for number, seconds, quiet in ((1, 0.5, 0.5), (1, 0.5, 1.0), (2, 0.5, 0.0), (2, 1.0, 1.0)):
        peer.update(Heartbeat.from_bytes(Heartbeat(HERE, number=number).to_bytes()), seconds)
        assert peer.quiet == quiet


def test_who_began_earlier_is_to_blame():
    earlier = Peer(Heartbeat(FAR, age=30.0, seconds_left=500.0))
    assert may_wait_for_peer(25.0, [earlier])
    assert not may_wait_for_peer(31.0, [earlier]) and may_wait_for_peer(31.0, [replace(earlier, quiet=2.0)])
    for seconds_left in (None, 0.0):
        assert not may_wait_for_peer(25.0, [Peer(Heartbeat(FAR, age=30.0, seconds_left=seconds_left))])


def test_errors_that_follow_from_anothers_are_recognized():
    assert is_secondary_error(RuntimeError("[../gloo/transport/tcp/pair.cc:537] Read error: Connection reset by peer"))
    try:
        try:
            raise RuntimeError("NCCL communicator was aborted")
        except RuntimeError as cause:
            raise ValueError("wrapped") from cause
    except ValueError as error:
        assert is_secondary_error(error)
    assert not is_secondary_error(RuntimeError("boom")) and not is_secondary_error(FileNotFoundError("gloo.txt"))


class BeatenStore:
    """A store in which another rank publishes its failure just before this one does."""

    def set(self, key: str, value: str) -> None:
        pass

    def check(self, keys: list[str]) -> bool:
        return False

    def multi_get(self, keys: list[str]) -> list[bytes]:
        return [b"-"] * len(keys)

    def compare_set(self, key: str, expected_value: str, desired_value: str) -> bytes:
        return b'{"rank": 1, "text": "", "status": 1}'


def test_the_second_rank_to_fail_is_silent(monkeypatch):
    said: list[str] = []
    monkeypatch.setattr("megatron.launch.watchdog.write_stderr", said.append)
    monkeypatch.setattr("os._exit", sys.exit)
    watch = JobWatchdog(
        BeatenStore(), LaunchEnvironment(0, 2), timedelta(minutes=10), timeouts=WatchdogTimeouts(period=0.01, settle=0.1)
    )
    with pytest.raises(SystemExit, match="1"):
        watch._publish("error: my own\n")
    assert not any(said)


class StoreOfLeftRank(BeatenStore):
    """A store whose rank left when it saw that this one is done, before this one had its last answer."""

    def __init__(self) -> None:
        self.beats: list[str] = []

    def set(self, key: str, value: str) -> None:
        self.beats.append(value)

    def multi_get(self, keys: list[str]) -> list[bytes]:
        if '"finished"' in self.beats[-1]:
            raise RuntimeError("Connection reset by peer")
        return super().multi_get(keys)


def test_the_store_may_leave_as_soon_as_all_are_done(monkeypatch):
    statuses: list[int] = []
    monkeypatch.setattr("os._exit", statuses.append)
    store = StoreOfLeftRank()
    watch = JobWatchdog(
        store, LaunchEnvironment(1, 2), timedelta(minutes=10), timeouts=WatchdogTimeouts(period=0.01, settle=0.1)
    )
    watch.start()
    watch.stop()
    assert '"finished"' in store.beats[-1] and not statuses
