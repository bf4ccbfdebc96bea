"""The Saver of a run: its snapshots, what it costs, whom it holds up, and what it says while others wait."""

import errno
import json
import os
import socket
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from crashes import ASSETS, FaultyStorage, build_saver, os_error_raiser, run_in_forks, save_at, save_once, small_run
from ranks import on_ranks
from sharded_state import ShardedState, build_mesh, build_state, load_and_compare

from megatron.checkpoint.find import find_checkpoint
from megatron.checkpoint.layout import CheckpointError, iteration_directories, read_manifest, read_state, verify
from megatron.checkpoint.load import verify_on_all_ranks
from megatron.checkpoint.storage import Storage
from megatron.launch.environment import LaunchEnvironment
from megatron.launch.heartbeat import WatchdogTimeouts
from megatron.launch.job import job
from megatron.launch.watchdog import Watchdog
from megatron.mesh.mesh import Mesh
from megatron.train.saving import Saver

LINES = [
    "saving checkpoint at iteration     100 to {}",
    "  successfully saved checkpoint at iteration     100 to {}",
]


class GatedStorage(Storage):
    """Lets nobody write, or nobody delete, before it is opened."""

    def __init__(self, *, deletions=False):
        self.opened, self.reached, self.deletions = threading.Event(), threading.Event(), deletions

    def write(self, path, chunks):
        if not self.deletions:
            self.reached.set()
            assert self.opened.wait(60)
        return super().write(path, chunks)

    def remove(self, path):
        if self.deletions and path.name.endswith(".deleted"):
            assert self.opened.wait(60)
        super().remove(path)


def change(run, by):
    """Change the whole state in place, as training does."""
    for part in run.held.values():
        for shard in part.shards():
            shard.data.add_(by)
        part.given["iteration"] = 1000 + by


def test_the_snapshot_is_the_states_of_its_step(tmp_path):
    """Training goes on while nothing is written yet. The buffers of the second save are those of the first."""
    storage = GatedStorage()
    run = small_run(tmp_path, async_save=True)
    saver = build_saver(run, storage)
    run.state.iteration = 100
    saver.save()
    change(run, 1)
    assert not find_or_none(tmp_path) and saver.saved == 100 and saver.seconds == 0.0
    saver.check()
    storage.opened.set()
    saver.finish()
    assert load_and_compare(str(tmp_path / "iter_0000100"), 1, 1) == 100
    assert saver.seconds > 0.0
    buffer = saver._planner._snapshot._buffer.data_ptr()
    for prefix, part in build_state(1, 0).items():
        for shard, original in zip(run.held[prefix].shards(), part.shards(), strict=True):
            shard.data.copy_(original.data)
        run.held[prefix].given["iteration"] = 7
    storage.opened.clear()
    run.state.iteration = 200
    saver.save()
    change(run, 1)
    storage.opened.set()
    saver.finish()
    assert load_and_compare(str(tmp_path / "iter_0000200"), 1, 1) == 200
    assert saver._planner._snapshot._buffer.data_ptr() == buffer
    save_at(run, saver, 300)
    with pytest.raises(AssertionError):
        load_and_compare(str(tmp_path / "iter_0000300"), 1, 1)
    assert read_state(tmp_path / "iter_0000300")["model"]["iteration"] == 1001


def find_or_none(root):
    try:
        return find_checkpoint(root)
    except CheckpointError:
        return None


def save_both(root: str) -> None:
    mesh = build_mesh(2, 1)
    for name in ("sync", "async"):
        run = small_run(f"{root}/{name}", mesh, tp=2, async_save=name == "async")
        save_at(run, build_saver(run), 100)


def test_both_ways_write_the_same_bytes(tmp_path):
    on_ranks(2, save_both, str(tmp_path))
    first, second = (tmp_path / name / "iter_0000100" for name in ("sync", "async"))
    names = sorted(p.relative_to(first) for p in first.rglob("*") if p.is_file())
    assert names == sorted(p.relative_to(second) for p in second.rglob("*") if p.is_file()) and len(names) == 7
    for name in names:
        theirs = (second / name).read_bytes()
        if name.name in ("config.json", "manifest.json"):  # the configurations differ in the two settings
            assert json.loads((first / name).read_bytes()).keys() == json.loads(theirs).keys()
        else:
            assert (first / name).read_bytes() == theirs
    ours, theirs = read_manifest(first), read_manifest(second)
    assert ours.tensors == theirs.tensors
    assert {n: r for n, r in ours.files.items() if n != "config.json"} == {
        n: r for n, r in theirs.files.items() if n != "config.json"
    }


def test_lines_about_a_save_come_once_and_when_they_are_true(tmp_path):
    """The second line comes when it is true; nothing comes twice."""
    said, storage = [], GatedStorage()
    run = small_run(tmp_path, async_save=True)
    saver = build_saver(run, storage, said)
    run.state.iteration = 100
    saver.save()
    saver.check()
    lines = [line.format(tmp_path) for line in LINES]
    assert said == lines[:1]
    storage.opened.set()
    saver._saving.thread.join()
    saver.check()
    saver.check()
    assert said == lines
    saver.finish()
    assert said == lines
    said.clear()
    run = small_run(tmp_path / "sync")
    save_at(run, build_saver(run, None, said), 100)
    assert said == [line.format(tmp_path / "sync") for line in LINES]


def test_a_failure_in_the_background_is_seen_at_the_next_step(tmp_path):
    save_once(tmp_path, 100)
    run = small_run(tmp_path, async_save=True)
    saver = build_saver(run, FaultyStorage(12, os_error_raiser(errno.EIO)))
    run.state.iteration = 200
    saver.save()
    saver._saving.thread.join()
    for call in (saver.check, saver.check, saver.finish):
        with pytest.raises(CheckpointError, match="iter_0000200: could not be saved: the disk: Input/output error"):
            call()
    assert find_checkpoint(tmp_path).name == "iter_0000100" and saver.saved is None
    # Continued, the numbers change at points that all ranks share, not in `check`.
    run = small_run(tmp_path, async_save=True, on_save_error="continue")
    saver = build_saver(run, FaultyStorage(12, os_error_raiser(errno.EIO)))
    run.state.iteration = 200
    saver.save()
    saver._saving.thread.join()
    saver.check()
    assert saver.saved == 200
    saver.finish()
    assert saver.saved is None


def test_what_is_no_fault_of_the_disk_is_never_passed_over(tmp_path):
    def fail():
        raise ValueError("a mistake")

    run = small_run(tmp_path, async_save=True, on_save_error="continue")
    with pytest.raises(CheckpointError, match="ValueError: a mistake"):
        save_at(run, build_saver(run, FaultyStorage(12, fail)), 100)
    run.held["model"].held.append(replace(run.held["model"].held[0], name="x", data=torch.ones(2)))
    with pytest.raises(CheckpointError, match=r"model.x: the data is"):
        save_at(run, build_saver(run), 100)


@pytest.mark.parametrize("async_save", [False, True], ids=["sync", "async"])
def test_nobody_waits_for_a_deletion(tmp_path, async_save):
    """Three saves end while the first deletion goes on, and what was set aside meanwhile goes with a later one."""
    storage = GatedStorage(deletions=True)
    run = small_run(tmp_path, async_save=async_save, keep_last=1)
    saver = build_saver(run, storage)
    for iteration in (100, 200, 300, 400):
        run.state.iteration = iteration
        saver.save()
        saver._finish_pending()
        assert list(iteration_directories(tmp_path)) == [iteration]
    assert len(list(tmp_path.glob(".iter_*.deleted"))) == 3
    storage.opened.set()
    saver.finish()
    save_at(run, saver, 500)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["iter_0000500", "latest_checkpointed_iteration.txt"]


def test_a_deletion_never_meets_a_save(tmp_path):
    """It is slow, and comes to an iteration that a crash has left unfinished when that is being saved again."""
    for name in (".iter_0000050.deleted", ".iter_0000200.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "shard_00009.safetensors").write_bytes(b"half a file")

    class Slow(GatedStorage):
        def write(self, path, chunks):
            record = super().write(path, chunks)
            if path.name == "shard_00000.safetensors" and ".iter_0000200.tmp" in str(path):
                self.opened.set()
                saver._deletion.join(30)
            return record

    run = small_run(tmp_path, async_save=True)
    saver = build_saver(run, Slow(deletions=True))
    for iteration in (100, 200):
        run.state.iteration = iteration
        saver.save()
        saver._finish_pending()
    saver.finish()
    verify(tmp_path / "iter_0000200")
    assert not list(tmp_path.glob("*/shard_00009*"))


class RecordingWatchdog(Watchdog):
    """Records the phases that it is told."""

    def __init__(self):
        self.said = []

    def doing(self, what, *, alone=False):
        self.said.append((str(what), alone))

    def waiting(self, what):
        self.said.append((str(what), None))


def test_comparing_says_how_far_it_has_come(tmp_path):
    """One phase for all of a rank's bytes would count as a hang where the disk is slow."""
    directory, heard = save_once(tmp_path, 100), RecordingWatchdog()
    verify_on_all_ranks(directory, Mesh.single().world, heard)
    read = {
        name
        for name in read_manifest(directory).files
        if any(f"hashing {directory / name} after" in what for what, _ in heard.said)
    }
    assert read == set(read_manifest(directory).files) and all(alone for _, alone in heard.said)


def test_who_waits_for_the_background_says_what_that_does(tmp_path):
    watch, storage = RecordingWatchdog(), GatedStorage()
    run = small_run(tmp_path, watch=watch, async_save=True)
    saver = build_saver(run, storage)
    run.state.iteration = 100
    saver.save()
    assert storage.reached.wait(60)
    threading.Timer(0.5, storage.opened.set).start()
    watch.said.clear()
    run.state.iteration = 200
    saver.save()
    shard = tmp_path / ".iter_0000100.tmp" / "shard_00000.safetensors"
    assert watch.said[0] == (f"waiting for the checkpoint of iteration 100: writing {shard}", True)
    saver.finish()
    assert verify(tmp_path / "iter_0000200").iteration == 200


def counted_save(root: str) -> tuple[int, list[str], list[str]]:
    """Bytes that this rank hands to collectives in the third save, and the collectives of the second and of the third."""
    mesh = build_mesh(2, 1)
    run = small_run(root, mesh, tp=2, async_save=True)
    run.held["model"] = ShardedState(2, mesh.tp.rank, tensors={f"w{i}": ((256, 64), 0, torch.float32) for i in range(8)})
    saver = build_saver(run)
    save_at(run, saver, 100)
    calls: list[tuple[str, int]] = []

    def counting(name, work):
        def call(*args, **more):
            tensors = [t for a in args for t in (a if isinstance(a, list) else [a]) if isinstance(t, torch.Tensor)]
            calls.append((name, sum(t.nbytes for t in tensors)))
            return work(*args, **more)

        return call

    before = {}
    for name in ("all_gather", "gather", "scatter", "broadcast", "all_reduce"):
        before[name] = getattr(dist.distributed_c10d, name)
        setattr(dist.distributed_c10d, name, counting(name, before[name]))
        setattr(dist, name, getattr(dist.distributed_c10d, name))
    try:
        save_at(run, saver, 200)
        second, total = [name for name, _ in calls], sum(size for _, size in calls)
        calls.clear()
        if mesh.rank == 1:  # one rank alone has something new: all must learn of it
            run.held["model"].held.extend(ShardedState(1, 0, tensors={"new": ((8, 8), None, torch.float32)}).held)
        save_at(run, saver, 300)
        return total, second, [name for name, _ in calls]
    finally:
        for name, work in before.items():
            setattr(dist.distributed_c10d, name, work)
            setattr(dist, name, work)


def test_no_tensor_travels_and_the_plan_is_kept(tmp_path):
    """Descriptions alone cross between ranks, and once it is known who writes what, not even those."""
    for total, second, third in on_ranks(2, counted_save, str(tmp_path)):
        assert 0 < total < 10_000 < 8 * 256 * 64 * 4
        assert "scatter" not in second and "all_reduce" in second
        assert "scatter" in third
    assert "model.new" in read_manifest(tmp_path / "iter_0000300").tensors
    verify(tmp_path / "iter_0000300")


def peak_kib() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1])
    return 0


def measure_save_memory(rank: int, root: str, async_save: bool) -> None:
    """Leave in a file by how much the peak of this process grows."""
    os.fsync = lambda handle: None
    run = small_run(Path(root), async_save=async_save)
    saver = build_saver(run)
    save_at(run, saver, 1)  # threads, imports
    run.held["model"] = ShardedState(1, 0, tensors={f"w{i}": ((4, 1 << 20), None, torch.float32) for i in range(4)})
    Path("/proc/self/clear_refs").write_text("5")
    before = peak_kib()
    save_at(run, saver, 2)
    save_at(run, saver, 3)
    Path(root, "grown").write_text(str((peak_kib() - before) * 1024))


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak of a process is reset through /proc")
@pytest.mark.parametrize("async_save", [False, True], ids=["sync", "async"])
def test_the_memory_that_a_save_takes(tmp_path, async_save):
    """In the background what the rank writes and a tenth more; in the foreground next to nothing.

    In a new process, which has no memory that others have freed.
    """
    here = Path(__file__).parent
    call = f"from test_saver import measure_save_memory; measure_save_memory(0, {str(tmp_path)!r}, {async_save})"
    program = f"import sys; sys.path[:0] = [{str(here)!r}, {str(here.parent)!r}]; {call}"
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, timeout=120)
    grown, size = int((tmp_path / "grown").read_text()), 4 * (16 << 20)
    assert grown < (1.1 if async_save else 0.1) * size
    assert not async_save or grown > 0.8 * size, "else this measures nothing"


def test_without_a_place_to_save_to(tmp_path):
    run = small_run(tmp_path)
    object.__setattr__(run.config.checkpoint, "save", None)
    with pytest.raises(ValueError, match="no --save"):
        build_saver(run)


def test_assets_from_a_function_and_a_failing_one(tmp_path):
    run = small_run(tmp_path)
    directory = save_at(run, Saver(run, lambda: ASSETS, print), 1)
    assert {n for n in read_manifest(directory).files if n.startswith("tokenizer/")} == {f"tokenizer/{n}" for n in ASSETS}
    with pytest.raises(CheckpointError, match="the disk: No space left on device"):
        Saver(run, os_error_raiser(errno.ENOSPC), print)


class StuckStorage(Storage):
    """A disk that never answers a write."""

    def write(self, path, chunks):
        threading.Event().wait(60)


def hang_in_the_background(rank: int, root: str, port: int) -> None:
    """Rank 1's disk never answers. Its watch ends the job while both main threads wait for it."""
    env = LaunchEnvironment(rank, 2, rank, 2, address="127.0.0.1", port=port)
    error = os.open(f"{root}/stderr{rank}", os.O_CREAT | os.O_WRONLY)
    os.dup2(error, 2)
    quick = WatchdogTimeouts(period=0.2, silent=3.0, hang=5.0, settle=1.0)
    with job(env, "gloo", 0.08, timeouts=quick) as started:
        run = small_run(f"{root}/run", build_mesh(2, 1), tp=2, watch=started.watch, async_save=True)
        saver = build_saver(run, StuckStorage() if rank == 1 else None)
        run.state.iteration = 100
        saver.save()
        saver.finish()


def test_a_disk_that_hangs_is_named(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    assert run_in_forks(2, hang_in_the_background, str(tmp_path), port) == [1, 1]
    said = (tmp_path / "stderr0").read_text() + (tmp_path / "stderr1").read_text()
    assert said.count("error: ") == 1, said
    assert (
        "error: rank 1 on host" in said and "waiting for the checkpoint of iteration 100: writing" in said and "hangs" in said
    )
