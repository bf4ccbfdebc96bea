"""Whatever the files of a checkpoint hold, reading it ends in what was saved, in form at least, or in a CheckpointError."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from pathlib import Path

import pytest
from fuzzing import JSON_VALUES, damaged_bytes, fuzz_settings, json_paths, set_at_path
from hypothesis import given
from hypothesis import strategies as st
from sharded_state import build_state, save_on_ranks

from megatron.checkpoint.layout import CheckpointError, Manifest, newest_complete, read_manifest, read_tracker
from megatron.checkpoint.load import load, read_tensor
from megatron.train.resume import _parse_counters as counters  # the reader of state.json
from megatron.train.state import TrainState


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("fuzz")
    save_on_ranks(str(root), 100, 1, 1)
    return root / "iter_0000100"


def use_checkpoint(directory: Path) -> str:
    """Everything that is done with a checkpoint before its values count."""
    try:
        manifest = read_manifest(directory)
        load(directory, build_state(1, 0, filled=False))
        for name in manifest.tensors:
            read_tensor(directory, manifest, name)
    except CheckpointError as error:
        assert str(directory) in str(error)
        return "refused"
    return "read"


def test_damaged_manifests(directory):
    path = directory / "manifest.json"
    good = path.read_bytes()

    @fuzz_settings(400)
    @given(damaged_bytes(good))
    def run(data: bytes) -> None:
        path.write_bytes(data)
        assert use_checkpoint(directory) == ("read" if data == good else "refused")

    run()
    path.write_bytes(good)
    assert use_checkpoint(directory) == "read"


def test_forged_manifests(directory):
    """Values of any kind at any place, and a right checksum over them."""
    path = directory / "manifest.json"
    good = path.read_text()
    body = json.loads(good)
    del body["checksum"]
    edits = st.lists(st.tuples(st.sampled_from(json_paths(body)), JSON_VALUES), min_size=1, max_size=3)
    seen = {"read": 0, "refused": 0}

    @fuzz_settings(300)
    @given(edits)
    def run(edits) -> None:
        forged = copy.deepcopy(body)
        for way, value in edits:
            set_at_path(forged, way, value)
        plain = json.dumps(forged, indent=1)
        forged["checksum"] = hashlib.sha256(plain.encode()).hexdigest()
        path.write_text(json.dumps(forged, indent=1) + "\n")
        seen[use_checkpoint(directory)] += 1

    run()
    path.write_text(good)
    assert seen["refused"] > 50


def update_manifest(directory: Path, name: str) -> None:
    """Put a file's size and checksum into the manifest, as who replaced it on purpose would."""
    body = json.loads((directory / "manifest.json").read_text())
    data = (directory / name).read_bytes()
    body["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    del body["checksum"]
    body["checksum"] = hashlib.sha256(json.dumps(body, indent=1).encode()).hexdigest()
    (directory / "manifest.json").write_text(json.dumps(body, indent=1) + "\n")


def test_forged_shards(directory, tmp_path):
    """A safetensors file with any header, under a manifest that vouches for it."""
    here = tmp_path / "iter_0000100"
    shutil.copytree(directory, here)
    shard = here / "shard_00000.safetensors"
    good = shard.read_bytes()
    head = 8 + int.from_bytes(good[:8], "little")
    seen = {"read": 0, "refused": 0}

    @fuzz_settings(150)
    @given(damaged_bytes(good[:head]))
    def run(data: bytes) -> None:
        shard.write_bytes(data + good[head:])
        update_manifest(here, shard.name)
        seen[use_checkpoint(here)] += 1

    run()
    assert seen["refused"] > 20


def test_damaged_counters_are_refused_or_valid(directory):
    """state.json of any content: a run's counters, or an error that names the file."""
    good = json.loads(json.dumps(TrainState(schedule={
        "peak": 1.0, "floor": 0.0, "style": "linear", "warmup": 0, "decay": 9, "decay_weights_from": 0.1,
        "decay_weights_to": 0.1, "decay_weights_style": "constant",
    }).scalars()))  # fmt: skip
    edits = st.lists(st.tuples(st.sampled_from(json_paths(good)), JSON_VALUES), min_size=1, max_size=3)

    @fuzz_settings(300)
    @given(edits)
    def run(edits) -> None:
        values = copy.deepcopy(good)
        for way, value in edits:
            set_at_path(values, way, value)
        try:
            state = counters(values, directory / "state.json")
        except CheckpointError as error:
            assert "state.json: train." in str(error)
            return
        assert state.iteration >= 0 and state.consumed_samples >= 0 and isinstance(state.schedule, dict)

    run()
    assert counters(good, directory).schedule["decay"] == 9


def test_a_damaged_tracker_is_refused_or_valid(directory):
    tracker = directory.parent / "latest_checkpointed_iteration.txt"
    good = tracker.read_bytes()

    @fuzz_settings(100)
    @given(st.binary(max_size=30) | damaged_bytes(good))
    def run(data: bytes) -> None:
        tracker.write_bytes(data)
        try:
            assert (read_tracker(directory.parent) or 0) >= 0
        except CheckpointError as error:
            assert "latest_checkpointed_iteration.txt: " in str(error)
        newest = newest_complete(directory.parent)
        assert newest.path == directory or (newest.skipped and not newest.empty), "never taken for a fresh start"

    run()
    tracker.write_bytes(good)


def test_a_manifest_keeps_what_it_says(directory):
    """So the refusals are not for everything."""
    text = (directory / "manifest.json").read_text()
    assert Manifest.from_text(text).to_text() == text and use_checkpoint(directory) == "read"
