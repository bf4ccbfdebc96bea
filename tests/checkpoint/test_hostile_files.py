"""Files of strangers: nothing in them runs, nothing is followed out of the checkpoint, nothing waits or takes all memory."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from models import BASE, build

from megatron.checkpoint.find import find_checkpoint
from megatron.checkpoint.layout import CheckpointError, newest_complete, read_config, read_state, verify
from megatron.checkpoint.load import load
from megatron.checkpoint.manifest import parse_strict_json
from megatron.checkpoint.save import save
from megatron.checkpoint.tokenizer import open_tokenizer
from megatron.checkpoint.weights import ModuleWeights
from megatron.config.command_line.saved import to_json
from megatron.config.command_line.toml_file import read_toml
from megatron.config.schema import CheckpointConfig, ModelConfig, RunSettings, TokenizerConfig
from megatron.data.errors import DataError
from megatron.data.tokenizer import ByteTokenizer, build_tokenizer, load_tokenizer
from megatron.inference.restore import open_model
from megatron.interop.hf_export import export_weights
from megatron.mesh.mesh import Axis, Mesh
from megatron.train.resume import find_source
from megatron.train.state import TrainState


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint with weights, counters and a tokenizer of many files."""
    root = tmp_path_factory.mktemp("saved")
    (root / "words").mkdir()
    ByteTokenizer().hf_files(root / "words", 128)
    tokenizer = build_tokenizer(TokenizerConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(root / "words")))
    config = ModelConfig(**{**BASE, "vocab_size": 257})
    parts = {"model": ModuleWeights(build(config, Axis.alone("tp"))), "train": TrainState(iteration=10)}
    save(root / "run", 10, parts, Mesh.single(), config=to_json(RunSettings(model=config)), assets=tokenizer.files())
    return root / "run"


@pytest.fixture
def run(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run")
    return tmp_path / "run"


def update_manifest(directory: Path, name: str) -> None:
    """Have the manifest vouch for a file as it is now, with a right checksum: damage is found by sums, malice is not."""
    body = json.loads((directory / "manifest.json").read_text())
    data = (directory / name).read_bytes()
    body["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    del body["checksum"]
    body["checksum"] = hashlib.sha256(json.dumps(body, indent=1).encode()).hexdigest()
    (directory / "manifest.json").write_text(json.dumps(body, indent=1) + "\n")


def ways_to_use(run: Path, tmp_path: Path):
    """Every way to use a checkpoint."""
    directory = run / "iter_0000010"
    yield lambda: find_source(CheckpointConfig(load=str(run)))
    yield lambda: find_source(CheckpointConfig(save=str(run), auto_resume=True))
    yield lambda: open_model(find_checkpoint(run))
    yield lambda: open_tokenizer(directory)
    yield lambda: export_weights(directory, tmp_path / "hf")
    yield lambda: verify(directory)
    yield lambda: load(directory, {"train": TrainState()}, strict=False)


class Canary:
    """An object that shows when a pickle was loaded: unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


NAMES = [
    "manifest.json", "config.json", "state.json", "shard_00000.safetensors", "../latest_checkpointed_iteration.txt",
    "tokenizer/megatron_tokenizer.json", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json",
    "tokenizer/special_tokens_map.json",
]  # fmt: skip


@pytest.mark.parametrize("form", ["pickle", "torch"])
@pytest.mark.parametrize("name", NAMES)
def test_a_pickle_under_any_name_is_not_run(run, tmp_path, name, form):
    canary, directory = tmp_path / "canary", run / "iter_0000010"
    path = directory / name
    if form == "pickle":
        path.write_bytes(pickle.dumps(Canary(canary)))
    else:
        torch.save({"model": Canary(canary)}, path)
    if name.startswith("../"):
        said: list[str] = []
        assert newest_complete(run).path == find_checkpoint(run, report=said.append) == directory
        assert "latest_checkpointed_iteration.txt: " in said[0]
    else:
        for vouched in (False, True)[: 1 if name == "manifest.json" else 2]:
            if vouched:
                update_manifest(directory, name)
            failed = [error for way in ways_to_use(run, tmp_path) if (error := refusal(way)) is not None]
            assert failed and all(Path(name).name in error or "config.json" in error for error in failed), failed
            assert vouched or len(failed) >= 5
    assert not canary.exists()
    pickle.loads(pickle.dumps(Canary(canary)))
    assert canary.exists(), "the pickle would have done it"


def refusal(way) -> str | None:
    try:
        way()
    except (CheckpointError, DataError) as error:
        return str(error)
    return None


@pytest.mark.parametrize("name", ["shard_00000.safetensors", "manifest.json", "config.json", "tokenizer/tokenizer.json"])
@pytest.mark.parametrize("to", ["outside", "/dev/zero", "circle", "fifo", "directory"])
def test_what_is_not_a_file_of_the_checkpoint_is_not_opened(run, tmp_path, name, to):
    """A link to the same bytes outside, one without an end, one to itself, a pipe that nobody writes to, a directory."""
    path = run / "iter_0000010" / name
    outside = tmp_path / "outside"
    path.rename(outside)
    if to == "fifo":
        os.mkfifo(path)
    elif to == "directory":
        path.mkdir()
    else:
        path.symlink_to({"outside": outside, "circle": path}.get(to, to))
    answers = [refusal(way) for way in ways_to_use(run, tmp_path)]
    refusals = [answer for answer in answers if answer is not None]
    # Who opens the tokenizer alone does not look at the others.
    assert len(refusals) >= len(answers) - 1 and all(Path(name).name in refused for refused in refusals), answers


def test_a_link_within_the_checkpoint_and_to_it_is_fine(run, tmp_path):
    shard = run / "iter_0000010" / "shard_00000.safetensors"
    shard.rename(shard.with_name("data"))
    shard.symlink_to("data")
    (tmp_path / "link").symlink_to(run)
    verify(find_checkpoint(tmp_path / "link"))


def test_a_tokenizer_file_that_nobody_saved(run):
    (run / "iter_0000010" / "tokenizer" / "added_tokens.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"added_tokens\.json: manifest\.json does not list it"):
        open_tokenizer(run / "iter_0000010")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"iteration": "100"}, r"state\.json: train.iteration: '100' is not a value"),
        ({"iteration": -1}, "train.iteration"),
        ({"iteration": True}, "train.iteration"),
        ({"consumed_samples": 1 << 70}, "train.consumed_samples"),
        ({"consumed_samples": None}, "train.consumed_samples"),
        ({"schedule": {"steps": 3}}, "train.schedule.steps"),
        ({"schedule": {"peak": "high"}}, "train.schedule.peak"),
        ({"schedule": {"peak": 0.1}}, "train.schedule: .* is missing"),
        ({"schedule": {"style": "__import__('os')"}}, "train.schedule.style"),
        ({"schedule": []}, "train.schedule"),
        ({"scaler": {"scale": "big"}}, "train.scaler.scale"),
        ({"window_loss": [1]}, "train.window_loss"),
    ],
)
def test_counters_of_a_wrong_kind(run, change, match):
    directory = run / "iter_0000010"
    state = read_state(directory)
    (directory / "state.json").write_text(json.dumps({**state, "train": {**state["train"], **change}}))
    update_manifest(directory, "state.json")
    with pytest.raises(CheckpointError, match=match):
        find_source(CheckpointConfig(load=str(run)))


TEXTS = {
    "NaN": '{"train": {"window_loss": NaN}}', "infinite": '{"train": {"window_loss": 1e999}}', "twice": '{"a": 1, "a": 2}',
    "deep": '{"a": ' + "[" * 100_000, "deep objects": '{"a": ' * 100_000, "list": "[]", "cut": '{"a"', "bytes": "\udcff",
    "part": '{"train": 3}', "long": '{"a": ' + "9" * 10_000 + "}",
}  # fmt: skip


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize(("name", "read"), [("state.json", read_state), ("config.json", read_config)])
def test_json_that_is_none_of_ours(run, text, name, read):
    directory = run / "iter_0000010"
    (directory / name).write_text(text, errors="surrogateescape")
    update_manifest(directory, name)
    if name == "config.json" and text == TEXTS["part"]:
        with pytest.raises(CheckpointError, match=r"config\.json: "):
            find_source(CheckpointConfig(load=str(run)))
        return
    with pytest.raises(CheckpointError, match=name):
        read(directory)


def test_json_of_nothing_but_brackets_is_not_built(monkeypatch):
    """A manifest may have a gigabyte: as empty lists, of 3 bytes each, it would take twenty in memory."""
    monkeypatch.setattr("megatron.checkpoint.manifest.MAX_VALUES", 100)
    assert len(parse_strict_json("[" + "[]," * 40 + "[]]")) == 41
    assert len(parse_strict_json("[" + "         1234567," * 200 + "1]")) == 201
    with pytest.raises(ValueError, match="more values than a checkpoint's file of its size can have"):
        parse_strict_json("[" + "[]," * 200 + "[]]")


def test_plain_json_still_reads_json():
    value = {"a": [1, 2.5, -3, True, None, "ü"], "b": {"c": 1e-300}}
    assert parse_strict_json(json.dumps(value)) == value == parse_strict_json(json.dumps(value).encode())


@pytest.mark.parametrize("change", [{"num_layers": 10**9}, {"hidden_size": 10**7}, {"ffn_hidden_size": 10**9}])
def test_a_configuration_that_asks_for_all_memory(run, tmp_path, change):
    directory = run / "iter_0000010"
    config = read_config(directory)
    (directory / "config.json").write_text(json.dumps({**config, "model": {**config["model"], **change}}))
    update_manifest(directory, "config.json")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        open_model(directory)
    if "num_layers" in change:
        with pytest.raises(CheckpointError, match=r"config\.json: it asks for 1,000,000,000 layers"):
            export_weights(directory, tmp_path / "hf")


@pytest.mark.parametrize(
    "change",
    [{"vocab_size": "9"}, {"extra_ids": 10**12}, {"type": []}, {"type": "Pickle"}, {"digest": None}, {"vocab_size": 1.5}],
)
def test_a_saved_tokenizer_that_lies(run, change):
    folder = run / "iter_0000010" / "tokenizer"
    about = folder / "megatron_tokenizer.json"
    about.write_text(json.dumps({**json.loads(about.read_text()), **change}))
    with pytest.raises(DataError):
        load_tokenizer(folder)


@pytest.mark.parametrize("text", ["a = " + "[" * 100_000, "a = " + "9" * 10_000, "[a" + ".a" * 3_000 + "]"])
def test_a_hostile_toml_file(tmp_path, text):
    path = tmp_path / "run.toml"
    path.write_text(text)
    assert read_toml(str(path)).problems
