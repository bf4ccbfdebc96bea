"""One run at a time in a --save: whoever is alive keeps it, nobody who is dead does."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from megatron.launch.errors import InputError
from megatron.launch.heartbeat import Process
from megatron.train import lock
from megatron.train.lock import LOCK_FILE, LockHolder, LockReading, acquire

OWN = Process.own()
FAR = Process("elsewhere", "another space", 7, 7)
GONE = replace(OWN, pid=OWN.pid, started=OWN.started - 1)  # the number is used again


@pytest.fixture
def other():
    """A process of this host that is alive until the test ends."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process, Process.here(process.pid)
    process.kill()
    process.wait()


def write_lock(root: Path, *ranks: Process, launcher: Process | None = None, ago: float = 0.0) -> Path:
    """A lock as another run left it."""
    root.mkdir(exist_ok=True)
    (root / LOCK_FILE).write_text(LockHolder("2026-01-01 10:00:00", ranks, launcher).to_text())
    os.utime(root / LOCK_FILE, (time.time() - ago,) * 2)
    return root


def ours() -> LockHolder:
    return LockHolder("now", (OWN,))


def test_a_lock_is_taken_and_released(tmp_path):
    root = tmp_path / "a" / "run"
    taken = acquire(root, ours(), pytest.fail)
    assert taken is not None and LockHolder.from_text((root / LOCK_FILE).read_text()) == ours()
    taken.set_processes([OWN, FAR])
    assert LockHolder.from_text((root / LOCK_FILE).read_text()) == LockHolder("now", (OWN, FAR)) and os.listdir(root) == [
        LOCK_FILE
    ]
    taken.release()
    assert not root.exists()


def test_a_living_run_is_named_and_left_alone(tmp_path, other):
    write_lock(tmp_path, other[1])
    text = (tmp_path / LOCK_FILE).read_text()
    said = rf"in use by another run, process {other[1].pid} on host \S+, since 2026-01-01 10:00:00"
    with pytest.raises(InputError, match=said):
        acquire(tmp_path, ours(), pytest.fail)
    assert (tmp_path / LOCK_FILE).read_text() == text and os.listdir(tmp_path) == [LOCK_FILE]


@pytest.mark.parametrize(
    ("ranks", "launcher", "ago", "state"),
    [
        ([GONE], None, 0.0, "gone"),
        ([GONE, GONE], GONE, 0.0, "gone"),
        ([FAR], None, 61.0, "gone"),
        ([FAR], None, 3.0, "silent"),
        ([FAR, FAR], FAR, -5.0, "silent"),
        ([GONE, FAR], None, 3.0, "dying"),  # the other host has half a minute
        ([GONE, FAR], None, 46.0, "gone"),
        (["alive"], None, 1000.0, "alive"),  # a clock that jumped
        (["alive", "alive"], "alive", 0.0, "alive"),
        ([GONE, "alive"], None, 0.0, "dying"),
        (["alive", GONE], None, 0.0, "dying"),
        (["alive"], GONE, 0.0, "dying"),
        (["alive", FAR], None, 0.0, "alive"),
        ([FAR, "alive"], None, 61.0, "dying"),
    ],
)
def test_the_state_of_another_run(ranks, launcher, ago, state, other):
    def real(process):
        return other[1] if process == "alive" else process

    holder = LockHolder("x", tuple(map(real, ranks)), real(launcher))
    assert LockReading(holder.to_text(), 0, ago).state(OWN) == state


@pytest.mark.parametrize("text", ["", "{", "[]", '{"since": 1, "ranks": [], "launcher": null}', '{"ranks": [{"pid": 1}]}'])
def test_a_torn_lock_is_judged_by_its_age(tmp_path, text):
    (tmp_path / LOCK_FILE).write_text(text)
    assert LockReading(text, 0, 3.0).state(OWN) == "silent" and LockReading(text, 0, 61.0).state(OWN) == "gone"
    os.utime(tmp_path / LOCK_FILE, (time.time() - 100,) * 2)
    acquire(tmp_path, ours(), pytest.fail).release()


def test_ranks_that_still_end_are_waited_for(tmp_path, other):
    """The first rank was killed, another one is on its way out."""
    write_lock(tmp_path, GONE, other[1])
    lines: list[str] = []
    threading.Timer(0.3, other[0].communicate).start()
    taken = acquire(tmp_path, ours(), lines.append)
    assert other[0].poll() is not None and len(lines) == 1 and "is ending" in lines[0] and f"process {GONE.pid} on" in lines[0]
    taken.release()


def test_ranks_that_do_not_end_are_not_waited_for_for_ever(tmp_path, other):
    write_lock(tmp_path, GONE, other[1])
    with pytest.raises(InputError, match="in use by another run"):
        acquire(tmp_path, ours(), lambda line: None, patience=0.1)


def test_a_touch_from_elsewhere_is_a_sign_of_life(tmp_path):
    write_lock(tmp_path, FAR, ago=20.0)
    lines: list[str] = []
    threading.Timer(0.3, os.utime, [tmp_path / LOCK_FILE]).start()
    with pytest.raises(InputError, match="process 7 on host elsewhere"):
        acquire(tmp_path, ours(), lines.append)
    assert len(lines) == 1 and "has not touched its lock so far" in lines[0]


def test_it_is_touched_and_a_loss_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "TOUCH_SECONDS", 0.02)
    lost = threading.Event()
    monkeypatch.setattr(lock, "_exit_with_error", lambda text: lost.set())
    taken = acquire(tmp_path, ours(), pytest.fail)
    os.utime(tmp_path / LOCK_FILE, (0, 0))
    deadline = time.monotonic() + 20.0
    while os.stat(tmp_path / LOCK_FILE).st_mtime == 0.0:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    (tmp_path / LOCK_FILE).unlink()
    while not (tmp_path / LOCK_FILE).exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    write_lock(tmp_path, FAR)
    assert lost.wait(20.0)
    taken.release()
    assert (tmp_path / LOCK_FILE).exists(), "it is another's"


def test_of_two_starts_one_gets_a_dead_runs_lock(tmp_path):
    """Also where the file system knows no flock."""
    code = (
        "import sys, fcntl, time; from pathlib import Path; from megatron.train.lock import acquire_for_run, InputError\n"
        "if sys.argv[2] == 'without': fcntl.flock = lambda *a: (_ for _ in ()).throw(OSError(95, 'not supported'))\n"
        "try: acquire_for_run(sys.argv[1], False, print); print('taken', flush=True); sys.stdin.read()\n"
        "except InputError: print('refused', flush=True)\n"
    )
    for how in ("with", "without"):
        root = write_lock(tmp_path / how, GONE)
        command = [sys.executable, "-c", code, str(root), how]
        started = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(3)]
        said = sorted(process.stdout.readline().strip() for process in started)
        for process in started:
            process.communicate()
        assert said == ["refused", "refused", "taken"]


def test_a_lock_that_another_start_took_meanwhile_is_put_back(tmp_path):
    """Only the lock that was judged dead is taken out of the way."""
    write_lock(tmp_path, FAR)
    dead, text = LockReading(LockHolder("x", (GONE,)).to_text(), 0, 0.0), (tmp_path / LOCK_FILE).read_text()
    assert not lock._remove_dead_lock(tmp_path / LOCK_FILE, dead) and (tmp_path / LOCK_FILE).read_text() == text
    assert lock._remove_dead_lock(tmp_path / LOCK_FILE, LockReading(text, 0, 0.0)) and os.listdir(tmp_path) == []


def test_a_directory_that_cannot_be_made_is_refused(tmp_path):
    """No checkpoint could be written there either, at the end of the first interval."""
    (tmp_path / "file").touch()
    with pytest.raises(
        InputError, match=f"--save {tmp_path}/file/run: cannot be created: Not a directory; choose another directory"
    ):
        acquire(tmp_path / "file" / "run", ours(), pytest.fail)


def test_a_directory_that_was_there_before_stays(tmp_path):
    """Somebody made it so: its rights, its quota, a file system of its own."""
    (tmp_path / "made").mkdir()
    acquire(tmp_path / "made", ours(), pytest.fail).release()
    assert os.listdir(tmp_path / "made") == []


def test_a_full_disk_is_left_as_it_was(tmp_path, monkeypatch, caplog):
    opened = os.open

    def full(path, flags, *mode):
        os.close(opened(path, flags, *mode))
        return opened("/dev/full", os.O_WRONLY)

    monkeypatch.setattr(
        lock.os, "open", lambda path, flags, *mode: (full if flags & os.O_CREAT else opened)(path, flags, *mode)
    )
    assert acquire(tmp_path, ours(), pytest.fail) is None
    monkeypatch.undo()
    assert "no lock can be created: No space left on device" in caplog.text and os.listdir(tmp_path) == []


def test_a_touch_in_the_future_is_not_believed_for_ever(tmp_path, monkeypatch):
    """The disk's clock was set back since: the lock never grows old, but nobody touches it either."""
    write_lock(tmp_path, FAR, ago=-1e6)
    monkeypatch.setattr(lock, "STALE_SECONDS", 0.2)
    monkeypatch.setattr(lock, "POLL_SECONDS", 0.05)
    taken = acquire(tmp_path, ours(), lambda line: None)
    assert LockHolder.from_text((tmp_path / LOCK_FILE).read_text()) == ours()
    taken.release()


def test_a_lock_that_is_no_file_hangs_nobody(tmp_path):
    os.mkfifo(tmp_path / LOCK_FILE)
    os.utime(tmp_path / LOCK_FILE, (time.time() - 100,) * 2)
    acquire(tmp_path, ours(), pytest.fail).release()
    assert os.listdir(tmp_path) == []
