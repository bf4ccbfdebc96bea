"""A save that dies or fails at any of its steps leaves the previous checkpoint usable, and the next save works."""

import os
import signal
import sys
import time

import pytest
from cuts import load_cut, mesh_of, save_cut, state

from megatron.checkpoint.layout import CheckpointError, find, iterations, newest_complete, read_tracker, verify
from megatron.checkpoint.save import prune, save
from megatron.checkpoint.storage import Storage

ASSETS = {"vocab.json": b"{}", "merges.txt": b"a b\n"}


@pytest.fixture(autouse=True)
def synced(monkeypatch):
    """Paths that were synced, in order. The disk itself is not waited for: a killed process loses no written byte."""
    found = []
    monkeypatch.setattr(os, "fsync", lambda handle: found.append(os.readlink(f"/proc/self/fd/{handle}")))
    return found


class Counting(Storage):
    """Calls `act` before step number `at` and after it; a write counts three steps: before, half written, after."""

    def __init__(self, at, act):
        self.at, self.act, self.steps = at, act, 0

    def step(self):
        self.steps += 1
        if self.steps - 1 == self.at:
            self.act()

    def write(self, path, chunks):
        self.step()

        def half():
            for i, chunk in enumerate(chunks):
                if i:
                    yield chunk
                    continue
                yield chunk[: len(chunk) // 2]
                self.step()
                yield chunk[len(chunk) // 2 :]

        record = super().write(path, half())
        self.step()
        return record

    def around(self, work, *args):
        self.step()
        work(*args)
        self.step()

    def make_directory(self, path):
        self.around(super().make_directory, path)

    def rename(self, source, target):
        self.around(super().rename, source, target)

    def remove(self, path):
        self.step()
        for shard in path.glob("shard_*") if path.is_dir() else ():  # a directory goes file by file
            shard.unlink()
            self.step()
        super().remove(path)
        self.step()


def save_with(root, iteration, storage=None, keep_last=None):
    config = {"iteration": iteration}
    return save(root, iteration, state(1, 0), mesh_of(1, 1), config=config, assets=ASSETS, keep_last=keep_last, storage=storage)


def die():
    sys.stdout.flush()
    os.kill(os.getpid(), signal.SIGKILL)


def killed_at(step, root, iteration, keep_last=None):
    """Save in a child that is killed at `step`; whether it was."""
    child = os.fork()
    if child == 0:
        save_with(root, iteration, Counting(step, die), keep_last)
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def steps_of(root, iteration, **more):
    counting = Counting(None, die)
    save_with(root, iteration, counting, **more)
    return counting.steps


@pytest.mark.parametrize("again", [False, True], ids=["new", "same iteration again"])
def test_killed_at_every_step(tmp_path, again):
    """SIGKILL before, within and after each step. The newest complete one is always whole; later saves clean up."""
    count = steps_of(tmp_path / "count", 100) + 6
    iteration = 100 if again else 200
    outcomes = set()
    for step in range(count):
        root = tmp_path / str(step)
        save_with(root, 100)
        died = killed_at(step, root, iteration, keep_last=None)
        newest = newest_complete(root)
        verify(newest.path)
        assert load_cut(str(newest.path), 1, 1) in (100, iteration)
        outcomes.add((died, newest.path.name.removesuffix(".replaced") == f"iter_{iteration:07d}"))
        if not again:
            assert find(root) in (root / "iter_0000100", root / "iter_0000200")
            verify(find(root))
        save_with(root, 300)
        assert [p.name for p in newest_complete(root).path.parent.iterdir() if p.name.startswith(".")] == []
        assert find(root).name == "iter_0000300"
        if not died:
            break
    assert (False, True) in outcomes, "the loop must reach the end of a save"
    if not again:
        assert {(True, False), (True, True)} < outcomes, "killed both before and after the commit"


def test_an_error_at_every_step_moves_no_tracker_to_a_torn_checkpoint(tmp_path):
    def fail():
        raise OSError(5, "Input/output error", "the disk")

    for step in range(steps_of(tmp_path / "count", 1)):
        root = tmp_path / str(step)
        save_with(root, 100)
        storage = Counting(step, fail)
        try:
            save_with(root, 200, storage)
        except CheckpointError as error:
            assert "iter_0000200: could not be saved: the disk: Input/output error" in str(error)
        assert not list(root.glob(".iter*"))
        verify(find(root))
        verify(newest_complete(root).path)


def test_a_killed_pruning_leaves_no_half_checkpoint(tmp_path):
    for n in (100, 200, 300):
        save_with(tmp_path / "count", n)
    count = steps_of(tmp_path / "count", 400, keep_last=1)
    for step in range(count - 12, count):
        root = tmp_path / str(step)
        for n in (100, 200, 300):
            save_with(root, n)
        assert killed_at(step, root, 400, keep_last=1)
        for path in iterations(root).values():
            verify(path)
        save_with(root, 500, keep_last=1)
        assert list(iterations(root)) == [500] and not list(root.glob(".iter*"))


def test_everything_is_synced_before_its_name_counts(tmp_path, synced):
    directory = save_with(tmp_path, 100)
    held = [p.relative_to(directory).as_posix() for p in directory.rglob("*")]
    temporary = f"{tmp_path}/.iter_0000100.tmp"
    tracker = synced.index(f"{tmp_path}/.latest_checkpointed_iteration.txt.tmp")
    before = synced[:tracker]
    assert {f"{temporary}/{name}" for name in held} | {temporary, str(tmp_path)} == set(before)
    assert before.index(temporary) > max(before.index(f"{temporary}/{name}") for name in held), "the directory after its files"
    assert before[-1] == synced[-1] == str(tmp_path), "the parent after each rename"


def test_leftovers_of_a_crash_are_overwritten(tmp_path):
    junk = tmp_path / ".iter_0000100.tmp"
    junk.mkdir(parents=True)
    assert newest_complete(tmp_path).skipped == (f"{junk}: a save that was interrupted",)
    (junk / "shard_00007.safetensors").write_bytes(b"half a file")
    directory = save_with(tmp_path, 100)
    assert not junk.exists() and not list(directory.glob("shard_00007*"))


def test_saving_the_same_iteration_again_replaces_it(tmp_path):
    save_with(tmp_path, 100)
    directory = save(tmp_path, 100, state(1, 0), mesh_of(1, 1), config={"second": True})
    assert '"second"' in (directory / "config.json").read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["iter_0000100", "latest_checkpointed_iteration.txt"]


def test_what_stays(tmp_path):
    for n in range(100, 800, 100):
        save(tmp_path, n, state(1, 0), mesh_of(1, 1), config={}, keep_last=2, keep_every=300)
    assert list(iterations(tmp_path)) == [300, 600, 700]
    # An unfinished one is no checkpoint: it is neither counted nor deleted. Later ones are not older.
    (tmp_path / "iter_0000650").mkdir()
    save(tmp_path, 690, state(1, 0), mesh_of(1, 1), config={}, keep_last=1)
    assert list(iterations(tmp_path)) == [650, 690, 700]
    assert prune(tmp_path, 700, 1, None) == [tmp_path / "iter_0000690"]
    assert prune(tmp_path, 700, None, 3) == []


def test_the_newest_complete_one(tmp_path):
    assert newest_complete(tmp_path / "nowhere").path is None
    for n in (100, 200, 300):
        save_cut(str(tmp_path), n, 1, 1)
    assert newest_complete(tmp_path).path == tmp_path / "iter_0000300" and not newest_complete(tmp_path).skipped
    (tmp_path / "iter_0000300" / "shard_00000.safetensors").write_bytes(b"short")
    (tmp_path / "iter_0000200" / "manifest.json").unlink()
    newest = newest_complete(tmp_path)
    assert newest.path == tmp_path / "iter_0000100"
    first, second = newest.skipped
    assert "iter_0000300/shard_00000.safetensors: 5 bytes, the manifest says" in first
    assert "iter_0000200: it has no manifest.json" in second


def test_the_newest_of_a_run_that_was_wound_back(tmp_path):
    """Saved 300, went back to 100, saved 200: 200 is the newest. But one finished after the tracker was written counts."""
    for n in (300, 200):
        save_cut(str(tmp_path), n, 1, 1)
        time.sleep(0.02)
    newest = newest_complete(tmp_path)
    assert newest.path == tmp_path / "iter_0000200" and "older than the latest save" in newest.skipped[0]
    save_cut(str(tmp_path), 400, 1, 1)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("200\n")
    os.utime(tmp_path / "latest_checkpointed_iteration.txt", (0, 0))
    assert read_tracker(tmp_path) == 200
    assert newest_complete(tmp_path).path == tmp_path / "iter_0000400"
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("")
    newest = newest_complete(tmp_path)
    assert newest.path == tmp_path / "iter_0000400" and "expected an iteration number, found ''" in newest.skipped[0]
