"""A save that dies or fails at any of its steps leaves the previous checkpoint usable, and the next save works.

In the foreground and in the background alike, on one rank and on two.
"""

import errno
import os
from pathlib import Path

import pytest
import torch.distributed as dist
from crashes import (
    FaultyStorage,
    build_saver,
    count_steps,
    kill_itself,
    os_error_raiser,
    run_in_forks,
    save_at,
    save_once,
    small_run,
)
from ranks import on_ranks
from sharded_state import build_mesh, build_state, load_and_compare, save_on_ranks

from megatron.checkpoint.find import find_checkpoint
from megatron.checkpoint.layout import CheckpointError, iteration_directories, newest_complete, verify
from megatron.checkpoint.save import prune, save

MODES = pytest.mark.parametrize("async_save", [False, True], ids=["sync", "async"])


@pytest.fixture(autouse=True)
def synced(monkeypatch):
    """Paths that were synced, in order. The disk itself is not waited for: a killed process loses no written byte."""
    found = []
    monkeypatch.setattr(os, "fsync", lambda handle: found.append(os.readlink(f"/proc/self/fd/{handle}")))
    return found


def save_and_die(rank, step, root, iteration, checkpoint):
    save_once(root, iteration, FaultyStorage(step, kill_itself), **checkpoint)


def killed_at(step, root, iteration, **checkpoint):
    """Save in a child that is killed at `step`; whether it was."""
    (status,) = run_in_forks(1, save_and_die, step, root, iteration, checkpoint)
    assert status in (0, -9)
    return status != 0


def assert_newest_is_whole(root, *among):
    """The newest checkpoint is whole, and one of these iterations."""
    newest = newest_complete(root).path
    verify(newest)
    assert load_and_compare(str(newest), 1, 1) in among
    return newest.name.removesuffix(".replaced")


@pytest.mark.parametrize(
    ("again", "async_save"), [(False, False), (True, False), (False, True)], ids=["new", "same iteration again", "new, async"]
)
def test_killed_at_every_step(tmp_path, again, async_save):
    """SIGKILL before, within and after each step. The newest complete one is always whole; later saves clean up."""
    count = count_steps(tmp_path / "count", 100, async_save=async_save) + 20
    iteration = 100 if again else 200
    outcomes = set()
    for step in range(count):
        root = tmp_path / str(step)
        save_once(root, 100)
        died = killed_at(step, root, iteration, async_save=async_save)
        outcomes.add((died, assert_newest_is_whole(root, 100, iteration) == f"iter_{iteration:07d}"))
        if not again:
            assert find_checkpoint(root) in (root / "iter_0000100", root / "iter_0000200")
            verify(find_checkpoint(root))
        save_once(root, 300, async_save=async_save)
        assert not list(root.glob(".iter*")) and find_checkpoint(root).name == "iter_0000300"
        assert set(iteration_directories(root)) >= {100, 300}, "nothing that was committed is lost"
        if not died:
            break
    assert (False, True) in outcomes, "the loop must reach the end of a save"
    if not again:
        assert {(True, False), (True, True)} < outcomes, "killed both before and after the commit"


@MODES
@pytest.mark.parametrize(
    ("number", "for_ever"),
    [(errno.ENOSPC, False), (errno.EIO, False), (errno.ENOSPC, True)],
    ids=["ENOSPC", "EIO", "ENOSPC from then on"],
)
def test_an_error_at_every_step(tmp_path, number, for_ever, async_save):
    """No tracker ever points to a torn checkpoint, the error is told, and the next save of the same run succeeds."""
    failed = 0
    for step in range(count_steps(tmp_path / "count", 1, async_save=async_save) + 4):
        root, said = tmp_path / str(step), []
        save_once(root, 100)
        storage = FaultyStorage(step, os_error_raiser(number), for_ever=for_ever)
        run = small_run(root, async_save=async_save, on_save_error="continue", keep_last=1)
        saver = build_saver(run, storage, said)
        save_at(run, saver, 200)
        assert "saving checkpoint at iteration     200" in said[0]
        if saver.saved is None:
            failed += 1
            assert f"iter_0000200: could not be saved: the disk: {os.strerror(number)}" in said[1]
            assert "Training continues without this checkpoint because of --on-save-error continue" in said[1]
            assert for_ever or not list(root.glob(".iter*"))
            assert 100 in iteration_directories(root), "nothing older goes before the new one is there"
        else:
            assert saver.saved == 200 and "successfully saved checkpoint at iteration     200" in said[1]
        assert len(said) == 2
        verify(find_checkpoint(root))
        assert_newest_is_whole(root, 100, 200)
        storage.at = None
        save_at(run, saver, 300)
        assert saver.saved == 300 and assert_newest_is_whole(root, 300) and find_checkpoint(root).name == "iter_0000300"
        assert sorted(p.name for p in root.iterdir()) == ["iter_0000300", "latest_checkpointed_iteration.txt"]
    assert failed > 30


@MODES
def test_an_error_stops_the_run_unless_it_was_told_otherwise(tmp_path, async_save):
    run = small_run(tmp_path, async_save=async_save)
    saver = build_saver(run, FaultyStorage(10, os_error_raiser(errno.ENOSPC)))
    with pytest.raises(CheckpointError, match=r"iter_0000200: could not be saved: the disk: No space left on device$"):
        save_at(run, saver, 200)
    assert saver.saved is None


class NearlyFullStorage(FaultyStorage):
    """A disk with 5,000 bytes left."""

    def free_bytes(self, path):
        super().free_bytes(path)
        return 5000


def test_a_full_disk_is_told_before_anything_is_written(tmp_path):
    save_once(tmp_path, 100)
    storage = NearlyFullStorage()
    with pytest.raises(CheckpointError) as error:
        save_once(tmp_path, 200, storage)
    written = sum(p.stat().st_size for p in (tmp_path / "iter_0000100").rglob("*") if p.is_file())
    needed = int(str(error.value).split("the checkpoint has ")[1].split()[0])
    assert 0.4 * written < needed <= written, "the manifest and the headers are not counted, and make up much of so little"
    assert f"{tmp_path}: no space: the checkpoint has {needed} bytes (0.0 GB), and 5000 (0.0 GB) are free" in str(error.value)
    assert "--keep-last" in str(error.value)
    assert storage.steps < 10 and not list(tmp_path.glob(".iter*"))
    junk = tmp_path / ".iter_0000050.deleted"
    junk.mkdir()
    storage = NearlyFullStorage()
    storage.free_bytes = lambda path: 5000 if junk.exists() else 1 << 30
    save_once(tmp_path, 200, storage)
    assert assert_newest_is_whole(tmp_path, 200), "room is made where a crash has left something"


# Two ranks.


def save_with_another(rank, root, iteration, storage, async_save):
    dist.init_process_group("gloo", init_method=f"file://{root}.{iteration}.group", rank=rank, world_size=2)
    mesh = build_mesh(2, 1)
    run = small_run(root, mesh, tp=2, async_save=async_save)
    save_at(run, build_saver(run, storage), iteration)


def two_and_one_dies(rank, root, step, mortal, async_save):
    save_with_another(rank, root, 200, FaultyStorage(step, kill_itself) if rank == mortal else None, async_save)


def count_two(root: str, async_save: bool) -> int:
    storage, run = FaultyStorage(), small_run(root, build_mesh(2, 1), tp=2, async_save=async_save)
    save_at(run, build_saver(run, storage), 100)
    return storage.steps


@MODES
def test_one_of_two_is_killed(tmp_path, async_save):
    """At every step of the second rank, and at every seventh of the first, which does the rest."""
    counts = on_ranks(2, count_two, str(tmp_path / "count"), async_save)
    cases = [(0, step) for step in range(counts[0] % 7, counts[0], 7)] + [(1, step) for step in range(counts[1])]
    assert counts[1] == 4 and len(cases) >= 10
    outcomes = set()
    for mortal, step in cases:
        root = tmp_path / f"{mortal}_{step}"
        save_once(root, 100)
        statuses = run_in_forks(2, two_and_one_dies, str(root), step, mortal, async_save)
        assert statuses[mortal] == -9 and statuses[1 - mortal] in (0, 1), "the other one ends, too"
        outcomes.add(assert_newest_is_whole(root, 100, 200))
        verify(find_checkpoint(root))
        save_once(root, 300)
        assert (
            not list(root.glob(".iter*"))
            and assert_newest_is_whole(root, 300)
            and set(iteration_directories(root)) >= {100, 300}
        )
    assert outcomes == {"iter_0000100", "iter_0000200"}


def fail_one_of_two(root: str, async_save: bool, counts: list[int]) -> list[str]:
    """Errors at every step of either rank, one after the other; what each rank says of each."""
    os_fsync, os.fsync = os.fsync, lambda handle: None
    mesh, lines = build_mesh(2, 1), []
    try:
        run = small_run(root, mesh, tp=2, async_save=async_save, on_save_error="continue", keep_last=2)
        said: list[str] = []
        saver = build_saver(run, None, said)
        for number, (mortal, step) in enumerate((rank, step) for rank in (0, 1) for step in range(counts[rank])):
            del said[:]
            saver._storage = FaultyStorage(step if mesh.rank == mortal else None, os_error_raiser(errno.EIO))
            save_at(run, saver, 2 * number + 1)
            dist.barrier()
            verify(find_checkpoint(Path(root))) if number else None
            assert number == 0 or find_checkpoint(Path(root)).name >= f"iter_{2 * number:07d}"
            dist.barrier()
            lines.append(said[1])
            saver._storage = FaultyStorage()
            save_at(run, saver, 2 * number + 2)
            assert saver.saved == 2 * number + 2
    finally:
        os.fsync = os_fsync
    return lines


@MODES
def test_an_error_on_one_of_two_is_known_on_both(tmp_path, async_save):
    counts = on_ranks(2, count_two, str(tmp_path / "count"), async_save)
    first, second = on_ranks(2, fail_one_of_two, str(tmp_path / "run"), async_save, counts)
    assert first == second
    told = [line.split("could not be saved: ")[1] for line in first if "could not be saved" in line]
    assert len(told) > sum(counts) // 2
    assert {line.split(":")[0] for line in told[: -counts[1]]} == {"rank 0"}
    assert {line.split(":")[0] for line in told[-counts[1] :]} == {"rank 1"}, (
        "every step of the second rank is before the commit"
    )
    assert_newest_is_whole(tmp_path / "run", 2 * sum(counts))
    assert len(iteration_directories(tmp_path / "run")) == 2 and not list((tmp_path / "run").glob(".iter*"))


def test_a_killed_pruning_leaves_no_half_checkpoint(tmp_path):
    for n in (100, 200, 300):
        save_once(tmp_path / "count", n)
    count = count_steps(tmp_path / "count", 400, keep_last=1)
    for step in range(count - 15, count):
        root = tmp_path / str(step)
        for n in (100, 200, 300):
            save_once(root, n)
        assert killed_at(step, root, 400, keep_last=1)
        for path in iteration_directories(root).values():
            verify(path)
        assert_newest_is_whole(root, 400)
        save_once(root, 500, keep_last=1)
        assert list(iteration_directories(root)) == [500] and not list(root.glob(".iter*"))


def test_everything_is_synced_before_its_name_counts(tmp_path, synced):
    directory = save_once(tmp_path / "new", 100)
    held = [p.relative_to(directory).as_posix() for p in directory.rglob("*")]
    assert {"tokenizer", "tokenizer/deep", "tokenizer/deep/merges.txt"} < set(held)
    root = f"{tmp_path}/new"
    temporary = f"{root}/.iter_0000100.tmp"
    assert synced.pop(0) == str(tmp_path), "the new directory's name"
    tracker = synced.index(f"{root}/.latest_checkpointed_iteration.txt.tmp")
    before = synced[:tracker]
    assert {f"{temporary}/{name}" for name in held} | {temporary} == set(before)
    assert before.index(temporary) > max(before.index(f"{temporary}/{name}") for name in held), "the directory after its files"
    assert synced[tracker + 1 :] == [root] * 3, "the parent after the next tracker, and after each rename"


def test_leftovers_of_a_crash_are_overwritten(tmp_path):
    junk = tmp_path / ".iter_0000100.tmp"
    junk.mkdir(parents=True)
    assert newest_complete(tmp_path).skipped == (f"{junk}: a save that was interrupted",)
    (junk / "shard_00007.safetensors").write_bytes(b"half a file")
    directory = save_once(tmp_path, 100)
    assert not junk.exists() and not list(directory.glob("shard_00007*"))


def test_saving_the_same_iteration_again_replaces_it(tmp_path):
    save_once(tmp_path, 100)
    directory = save(tmp_path, 100, build_state(1, 0), build_mesh(1, 1), config={"second": True})
    assert '"second"' in (directory / "config.json").read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["iter_0000100", "latest_checkpointed_iteration.txt"]


def test_only_what_a_save_left_is_deleted(tmp_path):
    for name in ("logs", "logs.replaced", ".cache.tmp"):
        (tmp_path / name).mkdir()
    save_once(tmp_path, 100)
    save_once(tmp_path, 200, keep_last=1)
    assert {"logs", "logs.replaced", ".cache.tmp"} < {p.name for p in tmp_path.iterdir()}


def test_what_a_damaged_successor_replaced_is_found_and_stays(tmp_path):
    save_once(tmp_path, 100)
    (tmp_path / "iter_0000100").rename(tmp_path / "iter_0000100.replaced")
    save_once(tmp_path, 90)
    (tmp_path / "iter_0000100").mkdir()
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("100\n")
    prune(tmp_path, 100, 1, None)
    newest = newest_complete(tmp_path)
    assert newest.path == tmp_path / "iter_0000100.replaced" and "iter_0000100: it has no manifest" in newest.skipped[0]
    save_once(tmp_path, 100)
    assert newest_complete(tmp_path).path == tmp_path / "iter_0000100"


def test_keep_last_and_keep_every_choose_the_checkpoints_that_stay(tmp_path):
    for n in range(100, 800, 100):
        save(tmp_path, n, build_state(1, 0), build_mesh(1, 1), config={}, keep_last=2, keep_every=300)
    assert list(iteration_directories(tmp_path)) == [300, 600, 700]
    # An unfinished one is no checkpoint: it is neither counted nor deleted. Later ones are not older.
    (tmp_path / "iter_0000650").mkdir()
    save(tmp_path, 690, build_state(1, 0), build_mesh(1, 1), config={}, keep_last=1)
    assert list(iteration_directories(tmp_path)) == [650, 690, 700]
    prune(tmp_path, 700, None, 3)
    assert list(iteration_directories(tmp_path)) == [650, 690, 700]
    prune(tmp_path, 700, 1, None)
    assert list(iteration_directories(tmp_path)) == [650, 700]


def test_a_damaged_checkpoint_is_not_counted_among_those_that_stay(tmp_path):
    """Whoever asks for two has two: a truncated one saves nobody, and is not deleted either."""
    for n in (100, 200, 300):
        save_once(tmp_path, n)
    (tmp_path / "iter_0000300" / "shard_00000.safetensors").write_bytes(b"short")
    save_once(tmp_path, 400, keep_last=2)
    assert list(iteration_directories(tmp_path)) == [200, 300, 400]


def test_the_newest_complete_one(tmp_path):
    assert newest_complete(tmp_path / "nowhere").path is None
    for n in (100, 200, 300):
        save_on_ranks(str(tmp_path), n, 1, 1)
    assert newest_complete(tmp_path).path == tmp_path / "iter_0000300" and not newest_complete(tmp_path).skipped
    (tmp_path / "iter_0000300" / "shard_00000.safetensors").write_bytes(b"short")
    (tmp_path / "iter_0000200" / "manifest.json").unlink()
    newest = newest_complete(tmp_path)
    assert newest.path == tmp_path / "iter_0000100"
    first, second = newest.skipped
    assert "iter_0000300/shard_00000.safetensors: 5 bytes, the manifest says" in first
    assert "iter_0000200: it has no manifest.json" in second
