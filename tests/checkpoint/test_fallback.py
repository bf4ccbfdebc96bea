"""A run starts from the newest whole checkpoint, says what it passed over, and never from random weights by accident."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from ranks import on_ranks
from sharded_state import ShardedState, build_state

from megatron.checkpoint.layout import CheckpointError
from megatron.checkpoint.load import load, verify_on_all_ranks
from megatron.checkpoint.save import save
from megatron.config.command_line.saved import to_json
from megatron.config.errors import ConfigError
from megatron.config.resolve import resolve
from megatron.config.schema import (
    BatchSettings,
    CheckpointConfig,
    DataSettings,
    ModelSettings,
    OptimSettings,
    RunConfig,
    RunSettings,
)
from megatron.launch.environment import LaunchEnvironment
from megatron.launch.job import Job
from megatron.mesh.grid import Grid
from megatron.mesh.mesh import Mesh
from megatron.optim.lr import LRSchedule
from megatron.train import resume
from megatron.train.resume import StateSource, check_source, difference_table, find_source, verify_source
from megatron.train.state import TrainState

CONFIG = resolve(
    RunSettings(
        model=ModelSettings(num_layers=2, hidden_size=32, num_attention_heads=2, max_position_embeddings=8, vocab_size=257),
        data=DataSettings(data_path=("data/text",), seq_length=8),
        optim=OptimSettings(lr=0.1),
        batch=BatchSettings(micro_batch_size=1, global_batch_size=1),
    )
)


def write(root: Path, iteration: int) -> Path:
    schedule = asdict(LRSchedule.from_config(CONFIG.optim, CONFIG.batch))
    counters = TrainState(iteration=iteration, schedule=schedule)
    return save(root, iteration, {**build_state(1, 0), "train": counters}, Mesh.single(), config=to_json(CONFIG))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    root = tmp_path_factory.mktemp("saved")
    for iteration in (100, 200, 300):
        write(root, iteration)
    return root


@pytest.fixture
def root(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run")
    return tmp_path / "run"


def flip_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def shard(root: Path, iteration: int) -> Path:
    return root / f"iter_{iteration:07d}" / "shard_00000.safetensors"


DAMAGE = {
    "torn": lambda root: (root / "iter_0000300" / "manifest.json").unlink(),
    "missing shard": lambda root: shard(root, 300).unlink(),
    "truncated": lambda root: shard(root, 300).write_bytes(shard(root, 300).read_bytes()[:-1]),
    "state": lambda root: flip_byte(root / "iter_0000300" / "state.json"),
    "manifest": lambda root: flip_byte(root / "iter_0000300" / "manifest.json"),
    "gone": lambda root: shutil.rmtree(root / "iter_0000300"),
    "flipped byte": lambda root: flip_byte(shard(root, 300)),
}
SAID = {
    "torn": "iter_0000300: it has no manifest.json",
    "missing shard": "iter_0000300/shard_00000.safetensors: No such file",
    "truncated": "iter_0000300/shard_00000.safetensors: .* bytes, the manifest says",
    "state": "iter_0000300/state.json: its bytes do not match",
    "manifest": "iter_0000300/manifest.json: not a usable manifest",
    "gone": "latest_checkpointed_iteration.txt: it names iteration 300, which is not there",
    "flipped byte": "iter_0000300/shard_00000.safetensors: its bytes do not match",
}


def load_on_one_process(config: CheckpointConfig) -> StateSource:
    """Return the state that a single process starts from."""
    run = replace(CONFIG, checkpoint=config)
    return verify_source(find_source(config), run, Job(LaunchEnvironment(0, 1), torch.device("cpu"), None))


def checkpoint_config(root: Path, how: str) -> CheckpointConfig:
    return CheckpointConfig(save=str(root), auto_resume=True) if how == "auto" else CheckpointConfig(load=str(root))


@pytest.mark.parametrize("how", ["auto", "load"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_the_next_older_one(root, damage, how):
    DAMAGE[damage](root)
    source = load_on_one_process(checkpoint_config(root, how))
    assert source.directory == root / "iter_0000200" and source.verified and source.state.iteration == 200
    *passed, loading = source.lines
    assert loading.startswith(f"loading checkpoint {root}/iter_0000200: weights with optimizer, schedule")
    assert len(passed) == 1 and re.match(f"passed over: .*{SAID[damage]}", passed[0])


def test_several_are_passed_over_one_line_each(root):
    flip_byte(shard(root, 300))
    shard(root, 200).unlink()
    source = load_on_one_process(checkpoint_config(root, "load"))
    assert (
        source.directory == root / "iter_0000100" and [line.split(":")[0] for line in source.lines[:2]] == ["passed over"] * 2
    )
    assert "iter_0000300/shard" in source.lines[0] and "iter_0000200/shard" in source.lines[1]


@pytest.mark.parametrize("damage", ["flipped byte", "truncated", "torn"])
def test_nothing_whole_is_an_error_never_a_fresh_start(root, damage):
    for iteration in (100, 200):
        shutil.rmtree(root / f"iter_{iteration:07d}")
    DAMAGE[damage](root)
    with pytest.raises(
        CheckpointError, match=f"--auto-resume: no checkpoint in .* is complete: .*{SAID[damage]}.*; to start fresh"
    ):
        load_on_one_process(checkpoint_config(root, "auto"))
    with pytest.raises(CheckpointError, match=f".*: there is no complete checkpoint: .*{SAID[damage]}"):
        load_on_one_process(checkpoint_config(root, "load"))


def test_only_an_empty_directory_starts_fresh(tmp_path):
    (tmp_path / ".iter_0000005.tmp").mkdir()
    for root in (tmp_path, tmp_path / "new"):
        source = load_on_one_process(checkpoint_config(root, "auto"))
        assert source.directory is None and source.lines[-1].startswith("starting fresh")
    assert "a save that was interrupted" in load_on_one_process(checkpoint_config(tmp_path, "auto")).lines[0]
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("5\n")
    with pytest.raises(CheckpointError, match="names iteration 5, which is not there"):
        load_on_one_process(checkpoint_config(tmp_path, "auto"))


def test_what_is_named_is_taken_or_refused(root):
    chosen = CheckpointConfig(load=str(root), load_iteration=300)
    flip_byte(shard(root, 300))
    for config in (chosen, CheckpointConfig(load=str(root / "iter_0000300"))):
        with pytest.raises(CheckpointError, match=r"its bytes do not match.*Other iterations there: 100, 200; choose one with"):
            load_on_one_process(config)
    assert load_on_one_process(replace(chosen, load_iteration=100)).directory == root / "iter_0000100"


def test_without_a_tracker_the_newest_is_taken(root):
    (root / "latest_checkpointed_iteration.txt").unlink()
    assert load_on_one_process(checkpoint_config(root, "load")).directory == root / "iter_0000300"


def load_on_rank(root: str, how: str) -> tuple[str, tuple[str, ...]]:
    rank = torch.distributed.get_rank()
    config = checkpoint_config(Path(root), how)
    job = Job(LaunchEnvironment(rank, torch.distributed.get_world_size()), torch.device("cpu"), "gloo")
    try:
        source = verify_source(find_source(config), replace(CONFIG, checkpoint=config), job)
    except CheckpointError as error:
        return "error", (str(error),)
    return str(source.directory), source.lines


def test_all_ranks_go_back_together(root):
    """Only one rank reads the damaged file, and all of them learn of it."""
    flip_byte(shard(root, 300))
    first, second = on_ranks(2, load_on_rank, str(root), "auto")
    assert first == second and first[0] == f"{root}/iter_0000200"
    assert "shard_00000.safetensors: its bytes do not match" in first[1][0]
    for iteration in (100, 200):
        flip_byte(shard(root, iteration))
    first, second = on_ranks(2, load_on_rank, str(root), "auto")
    assert first == second and first[0] == "error" and "no checkpoint in" in first[1][0]


def hashed(directory: str) -> list[str]:
    from megatron.checkpoint import layout

    read, hash_file = [], layout.hash_file
    layout.hash_file = lambda path, report: read.append(path.name) or hash_file(path, report)
    try:
        world = Mesh.build(Grid(dp=2), torch.distributed.get_rank()).world
        verify_on_all_ranks(Path(directory), world)
    finally:
        layout.hash_file = hash_file
    return read


def test_each_file_is_read_by_one_rank(root):
    directory = root / "iter_0000300"
    save(root, 300, build_state(1, 0), Mesh.single(), config={}, assets={f"{n}.txt": bytes(1000 * n) for n in range(5)})
    files = sorted(p.name for p in directory.rglob("*") if p.is_file() and p.name != "manifest.json")
    first, second = on_ranks(2, hashed, str(directory))
    assert sorted(first + second) == files and first and second


def load_flipped(directory: str) -> str:
    mesh = Mesh.build(Grid(dp=2), torch.distributed.get_rank())
    parts = build_state(1, 0, filled=False)
    try:
        load(Path(directory), parts, mesh)
    except CheckpointError as error:
        changed = any(s.data.any() for part in parts.values() for s in part.shards())
        return f"changed: {bool(changed)}; {error}"
    return "loaded"


def test_load_changes_nothing_before_every_byte_was_compared(root):
    flip_byte(shard(root, 300))
    for answer in on_ranks(2, load_flipped, str(root / "iter_0000300")):
        assert answer.startswith("changed: False; rank ") and "shard_00000.safetensors: its bytes do not match" in answer


def test_a_checkpoint_of_another_model_is_no_way_back(root, monkeypatch):
    flip_byte(shard(root, 300))
    run = replace(CONFIG, checkpoint=checkpoint_config(root, "auto"))
    source, real = find_source(run.checkpoint), resume.read_config
    monkeypatch.setattr(resume, "read_config", lambda d: {**real(d), "model": asdict(replace(CONFIG.model, hidden_size=64))})
    with pytest.raises(
        CheckpointError, match=r"passed over: .*; but it does not fit the command: `--hidden-size 32` .* made with 64"
    ):
        verify_source(source, run, Job(LaunchEnvironment(0, 1), torch.device("cpu"), None))


def test_settings_that_differ_from_the_saved_ones_are_listed(root):
    source = load_on_one_process(checkpoint_config(root, "load"))
    assert list(difference_table(source, CONFIG)) == []
    other = replace(
        CONFIG,
        optim=replace(CONFIG.optim, lr=0.2, clip_grad=2.0),
        layout=replace(CONFIG.layout, tensor_model_parallel_size=2),
        precision=replace(CONFIG.precision, bf16=True),
        batch=replace(CONFIG.batch, seed=7),
        checkpoint=CheckpointConfig(load="x"),
        log=replace(CONFIG.log, log_interval=1),
    )
    title, head, *rows, order = difference_table(source, other)
    assert order.startswith("  the order of samples differs"), "this checkpoint tells nothing of it, but the seed decides it"
    assert list(difference_table(source, other, False)) == [title, head, *rows]
    assert title == "  differs from the checkpoint:" and head.split("  ")[1] == "setting"
    columns = [head.index(word) for word in ("setting", "in the checkpoint", "requested", "used")]
    table = [[row[a:b].strip() for a, b in zip(columns, [*columns[1:], None], strict=True)] for row in rows]
    assert table == [
        ["schedule, peak", "0.1", "0.2", "the checkpoint's"],
        ["layout.tensor_model_parallel_size", "1", "2", "this run's"],
        ["batch.seed", "1234", "7", "this run's"],
        ["optim.clip_grad", "1.0", "2.0", "this run's"],
        ["precision.bf16", "False", "True", "this run's"],
    ]
    assert list(difference_table(replace(source, progress=False), other)) == []


def test_other_training_data_only_when_told_so(root, monkeypatch):
    source = load_on_one_process(checkpoint_config(root, "load"))

    def with_data(**change) -> RunConfig:
        return replace(CONFIG, data=replace(CONFIG.data, **change))

    for same in (with_data(), with_data(data_path=(os.path.abspath("data/text.bin"),)), with_data(valid_data_path=("v",))):
        check_source(source, same)
    mixed = with_data(data_path=("0.3", "data/text", "0.7", "data/code"))
    with pytest.raises(ConfigError) as caught:
        check_source(source, mixed)
    (problem,) = caught.value.problems
    assert str(problem) == (
        f"`--data-path 0.3 data/text 0.7 data/code` changes the training data of {source.directory}, which was trained on "
        "`data/text`; legal: data/text; --allow-data-change continues at the same position of the new order"
    )
    for change in (
        with_data(split="1,1,1"),
        with_data(dataloader_type="cyclic"),
        with_data(data_path=(), train_data_path=("data/text",)),
    ):
        with pytest.raises(ConfigError, match="changes the training data"):
            check_source(source, change)
    allowed = replace(mixed, checkpoint=CheckpointConfig(allow_data_change=True))
    check_source(source, allowed)
    assert "samples may be repeated" in list(difference_table(source, allowed))[-1]
    check_source(replace(source, progress=False), mixed)  # --finetune


def test_a_missing_part_is_found_before_a_value_changes(root):
    parts = {
        "model": ShardedState(1, 0, filled=False),
        "optimizer": ShardedState(1, 0, prefix="exp_avg.", filled=False),
        "more": TrainState(),
    }
    with pytest.raises(CheckpointError, match=r"state\.json: it has no more"):
        load(root / "iter_0000300", parts, Mesh.single())
    assert not any(s.data.any() for part in parts.values() for s in part.shards())
