"""Save in one layout, load in another; each byte written once, by whoever has the least to do."""

import json
from pathlib import Path

import pytest
import torch
from ranks import on_ranks
from safetensors import safe_open
from sharded_state import ShardedState, build_mesh, build_state, load_and_compare, save_on_ranks, state_bytes

from megatron.checkpoint.find import find_checkpoint
from megatron.checkpoint.layout import CheckpointError, read_config, read_manifest, read_state, verify
from megatron.checkpoint.load import load, read_tensor
from megatron.checkpoint.save import save
from megatron.checkpoint.save_plan import HeldPiece, make_global_plan
from megatron.checkpoint.storage import Storage

LAYOUTS = [(1, 1), (2, 1), (1, 2), (4, 1), (2, 2), (1, 4)]


def run(layout, function, *args):
    tp, dp = layout
    return [function(*args, tp, dp)] if tp * dp == 1 else on_ranks(tp * dp, function, *args, tp, dp)


@pytest.mark.parametrize("saved", LAYOUTS, ids=str)
def test_any_layout_loads_what_any_layout_saved(tmp_path, saved):
    (directory,) = set(run(saved, save_on_ranks, str(tmp_path), 100))
    assert Path(directory).name == "iter_0000100" and find_checkpoint(tmp_path) == Path(directory)
    manifest = verify(Path(directory))
    for wanted in LAYOUTS:
        assert set(run(wanted, load_and_compare, directory)) == {100}
    # Each tensor's bytes are there once, in files that any safetensors reader opens, and nothing else is.
    files = sorted(Path(directory).glob("shard_*.safetensors"))
    held = 0
    for path in files:
        with safe_open(str(path), "pt") as file:
            held += sum(file.get_tensor(key).nbytes for key in file.keys())  # noqa: SIM118
    assert held == state_bytes()
    assert {p.suffix for p in Path(directory).rglob("*") if p.is_file()} == {".safetensors", ".json"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["iter_0000100", "latest_checkpointed_iteration.txt"]
    assert len(files) == saved[0] * saved[1], "every rank takes its share"
    assert manifest.tensors["model.embedding.word.weight"].shape == (127, 12), "no padding"
    assert read_config(Path(directory)) == {"layout": {"tp": saved[0]}}
    assert read_state(Path(directory))["model"] == {"iteration": 7, "prefix": ""}


def test_replicas_share_the_writing():
    """On 8 x 16 ranks a tensor-parallel group's 16 replicas each write about a sixteenth of it."""
    held = []
    for rank in range(128):
        cut = ShardedState(8, rank % 8, tensors={f"layers.{i}.weight": ((64, 48), 0, torch.float32) for i in range(64)})
        held.append([HeldPiece(s.name, s.dtype, s.shape, s.part) for s in cut.shards()])
    plan = make_global_plan(held)
    assert sum(len(w) for w in plan.writes) == 64 * 8
    assert {len(w) for w in plan.writes} == {4}


def test_ranks_that_contradict_each_other_are_refused():
    cut = ShardedState(2, 0)
    held = [HeldPiece(s.name, s.dtype, s.shape, s.part) for s in cut.shards()]
    with pytest.raises(CheckpointError, match=r"embedding.word.weight: the ranks do not hold it .* 768 of 1524"):
        make_global_plan([held])
    other = [HeldPiece("steps", torch.int32, (), held[-1].part)]
    with pytest.raises(CheckpointError, match=r"steps: .*int32 on rank 1, .*int64 on another"):
        make_global_plan([[held[-1]], other])


def test_a_slice_reads_from_several_pieces(tmp_path):
    """Rectangles that fit no grid: a third of the rows from pieces cut over columns."""
    on_ranks(4, save_on_ranks, str(tmp_path), 1, 4, 1)
    directory = find_checkpoint(tmp_path)
    record = read_manifest(directory).tensors["model.layers.0.attention.dense.weight"]
    assert len(record.pieces) == 4
    whole = read_tensor(directory, read_manifest(directory), "model.layers.0.attention.dense.weight")
    assert torch.equal(whole, next(s.data for s in ShardedState(1, 0).shards() if s.name == "layers.0.attention.dense.weight"))


def test_values_are_cast_to_the_type_of_the_tensor_that_takes_them(tmp_path):
    tensors = {"w": ((4, 4), None, torch.float32)}
    directory = save(tmp_path, 1, {"model": ShardedState(1, 0, tensors=tensors)}, build_mesh(1, 1), config={})
    half = ShardedState(1, 0, tensors={"w": ((4, 4), None, torch.bfloat16)}, filled=False)
    load(directory, {"model": half})
    half.check()
    whole = ShardedState(1, 0, tensors={"w": ((4, 4), None, torch.int64)}, filled=False)
    with pytest.raises(CheckpointError, match=r"model.w: the checkpoint has torch.float32, requested is torch.int64"):
        load(directory, {"model": whole})


def test_what_does_not_fit_is_named_before_anything_changes(tmp_path):
    save_on_ranks(str(tmp_path), 100, 1, 1)
    directory = find_checkpoint(tmp_path)
    ours = {"layers.0.mlp_norm.weight": ((12,), None, torch.float32)}
    other = ShardedState(1, 0, tensors={**ours, "steps": ((3,), None, torch.int64)}, filled=False)
    with pytest.raises(
        CheckpointError, match=r"1 tensors do not fit: model.steps: the checkpoint has shape \[\], requested is \[3\]"
    ):
        load(directory, {"model": other})
    many = {**ours, **{f"layers.{i}.new": ((2,), None, torch.float32) for i in range(30)}}
    with pytest.raises(CheckpointError, match=r"30 tensors are not in the checkpoint: model.layers.0.new, ") as failure:
        load(directory, {"model": ShardedState(1, 0, tensors=many, filled=False)})
    assert str(failure.value).count(".new") == 20 and str(failure.value).endswith(", ...")
    fewer = ShardedState(1, 0, tensors=ours, filled=False)
    with pytest.raises(CheckpointError, match=r"4 unexpected tensors: model\.embedding\.word\.weight"):
        load(directory, {"model": fewer})
    for cut in (other, fewer):
        assert not any(s.data.any() for s in cut.shards()) and cut.given == {}
    loaded = load(directory, {"model": ShardedState(1, 0, tensors=many, filled=False)}, strict=False)
    assert len(loaded.missing) == 30 and len(loaded.unexpected) == 4
    with pytest.raises(CheckpointError, match=r"new.layers"):
        load(directory, {"new": fewer})


def split_over_stages(root: str) -> None:
    """Two ranks that hold different tensors, as pipeline stages do: neither takes the other's for unexpected."""
    mesh = build_mesh(1, 2)
    tensors = {f"layers.{mesh.rank}.weight": ((4, 4), None, torch.float32), "embedding": ((5, 2), None, torch.float32)}
    directory = save(Path(root), 1, {"model": ShardedState(1, 0, tensors=tensors)}, mesh, config={})
    cut = ShardedState(1, 0, tensors=tensors, filled=False)
    load(directory, {"model": cut}, mesh)
    cut.check()


def test_ranks_with_different_tensors(tmp_path):
    on_ranks(2, split_over_stages, str(tmp_path))
    assert sorted(read_manifest(find_checkpoint(tmp_path)).tensors) == [
        "model.embedding",
        "model.layers.0.weight",
        "model.layers.1.weight",
    ]


class FullStorage(Storage):
    """No space for shards, on one rank."""

    def write(self, path, chunks):
        if path.name == "shard_00001.safetensors":
            raise OSError(28, "No space left on device", str(path))
        return super().write(path, chunks)


def fail_to_save(root: str) -> str:
    mesh = build_mesh(2, 2)
    try:
        save(Path(root), 200, build_state(2, mesh.tp.rank), mesh, config={}, storage=FullStorage())
    except CheckpointError as error:
        return str(error)
    return ""


def test_a_full_disk_on_one_rank_fails_all_and_leaves_the_previous_one(tmp_path):
    on_ranks(4, save_on_ranks, str(tmp_path), 100, 2, 2)
    (message,) = set(on_ranks(4, fail_to_save, str(tmp_path)))
    assert "iter_0000200: could not be saved: rank 1: " in message and "No space left on device" in message
    assert sorted(p.name for p in tmp_path.iterdir()) == ["iter_0000100", "latest_checkpointed_iteration.txt"]
    assert find_checkpoint(tmp_path).name == "iter_0000100"


def fail_to_load(root: str) -> str:
    mesh = build_mesh(2, 1)
    parts = build_state(2, mesh.tp.rank, filled=False)
    try:
        load(find_checkpoint(Path(root)), parts, mesh)
    except CheckpointError as error:
        return str(error)
    return ""


def test_a_bad_file_that_one_rank_reads_fails_all(tmp_path):
    """Only the second rank needs the spoilt file, yet the first must not wait for it in vain."""
    on_ranks(2, save_on_ranks, str(tmp_path), 100, 2, 1)
    directory = find_checkpoint(tmp_path)
    manifest = json.loads((directory / "manifest.json").read_text())
    spoilt = manifest["tensors"]["model.layers.0.attention.qkv.weight"]["pieces"][1]["file"]
    size = (directory / spoilt).stat().st_size
    (directory / spoilt).write_bytes(b"\0" * size)
    (message,) = set(on_ranks(2, fail_to_load, str(tmp_path)))
    assert f"{spoilt}: its bytes do not match" in message
