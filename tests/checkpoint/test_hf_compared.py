"""Comparisons made when a Hugging Face directory is read or written: copies of tensors, and the logits of both models."""

from __future__ import annotations

import json
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")

import hf_models  # noqa: E402
from models import BASE, BERT, LLAMA, list_family, with_rows  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from megatron.checkpoint.layout import CheckpointError  # noqa: E402
from megatron.checkpoint.weights import ModuleWeights  # noqa: E402
from megatron.config.schema import ModelConfig  # noqa: E402
from megatron.contract import StagePart  # noqa: E402
from megatron.interop.checked_export import ExportError, export_hf  # noqa: E402
from megatron.interop.checked_import import write_imported  # noqa: E402
from megatron.interop.compare_logits import LogitsError, compare_with_source  # noqa: E402
from megatron.interop.families.gpt2 import GPT2  # noqa: E402
from megatron.interop.families.llama import LLAMA as LLAMA_FAMILY  # noqa: E402
from megatron.interop.families.table import family_for_export  # noqa: E402
from megatron.interop.hf_import import read_hf  # noqa: E402
from megatron.interop.tensor_mapping import SAME  # noqa: E402
from megatron.model.build import MODELS  # noqa: E402
from megatron.model.init import initialize  # noqa: E402
from megatron.parallel.tensor_parallel import TensorParallel  # noqa: E402

TOOL = Path(__file__).parents[2] / "tools" / "import_hf.py"
TIED = {"gpt2": "transformer.wte.weight", "llama tied": "model.embed_tokens.weight"}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(directory, config.json, tensors) of the models by name, each written once."""
    made = {}

    def one(name):
        if name not in made:
            directory = tmp_path_factory.mktemp("foreign")
            about = hf_models.write_hf_directory(name, directory)
            made[name] = directory, about, load_file(directory / "model.safetensors")
        return made[name]

    return one


def write_directory(directory, about, tensors):
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(about))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors")
    return directory


def run_import(monkeypatch, capsys, source, save, *more):
    monkeypatch.setattr(sys, "argv", ["import_hf.py", "--input", str(source), "--save", str(save), *more])
    status = runpy.run_path(str(TOOL))["main"]()
    return (status, *capsys.readouterr())


@pytest.mark.parametrize("name", TIED)
@pytest.mark.parametrize("left_out", [False, True])
def test_an_output_matrix_beside_a_tied_embedding(tmp_path, written, name, left_out):
    """Compared as transformers compares them: equal, or another matrix, which is then used; or the only one there is."""
    _, about, tensors = written(name)
    about = {field: value for field, value in about.items() if field != "tie_word_embeddings" or not left_out}
    said, word = [], tensors[TIED[name]]
    if left_out and name != "gpt2":
        with pytest.raises(CheckpointError, match=r"there is no tensor lm_head.weight"):  # the class's default is untied
            read_hf(write_directory(tmp_path, about, tensors))
        return
    config, weights = read_hf(write_directory(tmp_path, about, {**tensors, "lm_head.weight": word.clone()}), said.append)
    assert config.ties_embeddings and "head.weight" not in weights and not said
    compare_with_source(tmp_path, config, weights)
    other = word.flip(0) + 1
    config, weights = read_hf(write_directory(tmp_path, about, {**tensors, "lm_head.weight": other}), said.append)
    assert not config.ties_embeddings and torch.equal(weights["head.weight"], other)
    assert [f"lm_head.weight differs from {TIED[name]}: it is read as untied" in line for line in said] == [True]
    compare_with_source(tmp_path, config, weights)
    alone = {"lm_head.weight" if key == TIED[name] else key: tensor for key, tensor in tensors.items()}
    config, weights = read_hf(write_directory(tmp_path, about, alone))
    assert config.ties_embeddings and torch.equal(weights["embedding.word.weight"], word)
    compare_with_source(tmp_path, config, weights)


@pytest.mark.parametrize("name", ["bert", "bert words"])
@pytest.mark.parametrize("copy", ["weight", "bias"])
def test_the_copies_of_a_megatron_bert(tmp_path, written, name, copy):
    _, about, tensors = written(name)
    original = "bert.embeddings.word_embeddings.weight" if copy == "weight" else "cls.predictions.bias"
    twin = f"cls.predictions.decoder.{copy}"
    rest = {key: tensor for key, tensor in tensors.items() if key not in (original, twin)}
    value = tensors[original]
    for held in ({original: value}, {original: value, twin: value.clone()}, {twin: value}):
        config, weights = read_hf(write_directory(tmp_path, about, {**rest, **held}))
        assert torch.equal(weights["embedding.word.weight" if copy == "weight" else "masked_words.bias"], value)
    compare_with_source(tmp_path, config, weights)
    with pytest.raises(CheckpointError, match=f"cls.predictions.decoder.{copy} differs from {original}"):
        read_hf(write_directory(tmp_path, about, {**rest, original: value, twin: value + 1}))


def test_a_tensor_in_two_files(tmp_path, written):
    _, about, tensors = written("llama")
    write_directory(tmp_path, about, {})
    (tmp_path / "model.safetensors").unlink()
    where = {"model.norm.weight": "model-00001-of-00002.safetensors", "lm_head.weight": "model-00002-of-00002.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    save_file(tensors, tmp_path / "model-00001-of-00002.safetensors")
    norm = tensors["model.norm.weight"]
    save_file({"model.norm.weight": norm.clone()}, tmp_path / "model-00002-of-00002.safetensors")
    assert torch.equal(read_hf(tmp_path)[1]["final_norm.weight"], norm)
    save_file({"model.norm.weight": norm + 1}, tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002.*model.norm.weight has other values in another file"):
        read_hf(tmp_path)


def test_an_adapter_is_not_passed_over(tmp_path, written):
    """Transformers opens the adapter's model there, where PEFT is installed."""
    _, about, tensors = written("llama")
    write_directory(tmp_path, about, tensors)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(CheckpointError, match=r"adapter_config.json in it, .*merge adapter and model with merge_and_unload"):
        read_hf(tmp_path)


def test_what_people_give_instead_of_a_directory(tmp_path):
    snapshot = tmp_path / "models--gpt2" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    (snapshot / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 5\n")
    for given, words in (
        (tmp_path / "absent", "there is no such directory"),
        (snapshot / "config.json", "it is a file; give its directory"),
        (tmp_path / "models--gpt2", f"the latest model is in {snapshot}"),
        (snapshot, "it is a pointer of Git LFS, in place of the file itself; run `git lfs pull`"),
    ):
        with pytest.raises(CheckpointError, match=words):
            read_hf(given)


def test_no_weight_is_rounded_without_being_asked(tmp_path, written):
    """Norms in fp32 beside matrices in bf16, as released models have them."""
    _, about, tensors = written("llama")
    mixed = {key: tensor if "norm" in key else tensor.bfloat16() for key, tensor in tensors.items()}
    config, weights = read_hf(write_directory(tmp_path / "mixed", about, mixed), say=print)
    export_hf(write_imported(tmp_path / "run", config, weights), tmp_path / "hf", say=lambda line: None)
    back = load_file(tmp_path / "hf" / "model.safetensors")
    assert all(torch.equal(back[key], tensor.float()) for key, tensor in mixed.items())
    export_hf(tmp_path / "run", tmp_path / "half", dtype=torch.bfloat16, say=lambda line: None)
    assert {t.dtype for t in load_file(tmp_path / "half" / "model.safetensors").values()} == {torch.bfloat16}


def test_an_import_reports_logits_and_suspicious_weights(tmp_path, written, monkeypatch, capsys):
    source, about, tensors = written("llama")
    status, out, err = run_import(monkeypatch, capsys, source, tmp_path / "ours")
    assert status == 0 and "transformers' logits differ by at most" in out and "all zeros" not in err
    saved = json.loads((tmp_path / "ours" / "iter_0000000" / "config.json").read_text())["model"]
    assert saved["hidden_dropout"] == 0.0 and saved["attention_dropout"] == 0.3 and saved["layernorm_epsilon"] == 3e-3
    key = "model.layers.1.mlp.up_proj.weight"
    zeros = write_directory(tmp_path / "zeros", about, {**tensors, key: torch.zeros(40, 16)})
    status, out, err = run_import(monkeypatch, capsys, zeros, tmp_path / "zeros-ours")
    assert status == 0 and f"note: {key} is all zeros" in err
    for change, words in ((tensors[key].int(), "holds int32"), (tensors[key].log(), "has values that are not finite")):
        bad = write_directory(tmp_path / "bad", about, {**tensors, key: change})
        status, out, err = run_import(monkeypatch, capsys, bad, tmp_path / "bad-ours")
        assert status == 2 and f"{key} {words}" in err and not (tmp_path / "bad-ours").exists()


def test_an_import_that_differs_leaves_nothing(tmp_path, written, monkeypatch, capsys):
    """A reader that errs: status 1, and nothing under the name."""
    source, *_ = written("llama")
    rows = tuple(
        replace(row, conversion=replace(SAME, from_hf=lambda tensors, config: tensors[0].flip(0)))
        if "mlp_norm" in row.native
        else row
        for row in LLAMA_FAMILY.classes[0].templates
    )
    list_family(monkeypatch, with_rows(LLAMA_FAMILY, rows))
    status, out, err = run_import(monkeypatch, capsys, source, tmp_path / "ours")
    assert status == 1 and "the logits differ by" in err and "--no-verify" in err and not (tmp_path / "ours").exists()
    status, out, err = run_import(monkeypatch, capsys, source, tmp_path / "ours", "--no-verify")
    assert status == 0 and "not compared with transformers (--no-verify)" in out
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "transformers", None)
    status, out, err = run_import(monkeypatch, capsys, source, tmp_path / "again")
    assert status == 0 and "not compared with transformers' logits: transformers is not installed" in out


def test_settings_that_the_weights_of_a_model_hide(tmp_path, written):
    """Loud embeddings hide an epsilon, and the two forms of GELU are close."""
    _, about, tensors = written("gpt2")
    loud = {key: tensor * 20 if key.startswith("transformer.w") else tensor for key, tensor in tensors.items()}
    config, weights = read_hf(write_directory(tmp_path, about, loud))
    compare_with_source(tmp_path, config, weights)
    for wrong in (replace(config, layernorm_epsilon=3.1e-3), replace(config, activation="gelu-exact")):
        with pytest.raises(LogitsError, match="logits differ"):
            compare_with_source(tmp_path, wrong, weights)


def save_untrained_model(root, settings):
    """A model that was never trained: biases of zero, norms of one."""
    config = ModelConfig(**settings)
    model = MODELS[config.architecture](config, StagePart(range(2), True, True), TensorParallel.alone())
    initialize(model, config, 7)
    write_imported(root, config, {shard.name: shard.data for shard in ModuleWeights(model).shards()})
    return root


@pytest.mark.parametrize(
    ("settings", "field", "value", "words"),
    [
        (BASE, "layer_norm_epsilon", 1.3e-5, "layernorm_epsilon"),
        (BASE, "resid_pdrop", 0.3, "hidden_dropout"),
        (BASE, "attn_pdrop", 0.3, "attention_dropout 0.3, the checkpoint 0.1"),
        (BASE, "activation_function", "gelu", "with random weights in both models the logits differ"),
        (LLAMA, "rms_norm_eps", 1.3e-5, "layernorm_epsilon"),
        (LLAMA, "rope_parameters", {"rope_theta": 11000.0, "rope_type": "default"}, "rope_theta` is 10000.0 and"),
        (BERT, "hidden_act", "gelu", "with random weights in both models the logits differ"),
    ],
)
def test_a_wrong_setting_fails_the_export_of_a_fresh_model(tmp_path, monkeypatch, settings, field, value, words):
    family = family_for_export(ModelConfig(**settings))
    wrong = {field: value} | ({"embd_pdrop": value} if field == "resid_pdrop" else {})
    changed = replace(family, to_fields=lambda config: {**family.to_fields(config), **wrong})
    list_family(monkeypatch, changed)
    with pytest.raises((ExportError, CheckpointError), match=words):
        export_hf(save_untrained_model(tmp_path / "run", settings), tmp_path / "hf", say=lambda line: None)
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize(
    "exchanged",
    [
        ("layers.{n}.attention.dense.bias", "layers.{n}.mlp.down.bias"),
        ("layers.{n}.input_norm.weight", "layers.{n}.mlp_norm.weight"),
        ("layers.{n}.input_norm.bias", "layers.{n}.attention.dense.bias"),
    ],
)
def test_exchanged_tensors_fail_the_export_of_a_fresh_model(tmp_path, monkeypatch, exchanged):
    """Two that are equal in the checkpoint: its own weights do not tell."""
    theirs = {row.native: row.hf for row in GPT2.classes[0].templates}
    swap = dict(zip(exchanged, reversed(exchanged), strict=True))
    rows = tuple(replace(row, hf=theirs[swap.get(row.native, row.native)]) for row in GPT2.classes[0].templates)
    list_family(monkeypatch, with_rows(GPT2, rows))
    with pytest.raises(ExportError, match="with random weights in both models the logits differ"):
        export_hf(save_untrained_model(tmp_path / "run", BASE), tmp_path / "hf", say=lambda line: None)
