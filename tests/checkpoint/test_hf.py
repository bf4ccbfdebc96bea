"""The exported directory, opened by transformers itself: same logits, same tokens, nothing missing, nothing too much."""

import json
import os
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import BASE, LLAMA, build, list_family, max_difference, save_model, with_rows
from ranks import on_ranks
from safetensors.torch import load_file

from megatron.checkpoint.find import find_checkpoint
from megatron.checkpoint.layout import CheckpointError
from megatron.checkpoint.save import save
from megatron.checkpoint.weights import ModuleWeights
from megatron.config.command_line.saved import to_json
from megatron.config.schema import ModelConfig, RunSettings
from megatron.contract import Batch
from megatron.data.tokenizer import ByteTokenizer, NullTokenizer
from megatron.files.outputs import OutputError
from megatron.inference.restore import open_model
from megatron.interop.checked_export import ExportError, export_hf
from megatron.interop.compare_logits import gpt_logits
from megatron.interop.families.gpt2 import GPT2
from megatron.interop.hf_export import export_weights
from megatron.interop.tensor_mapping import CONV1D, SAME
from megatron.mesh.mesh import Axis, Mesh

transformers = pytest.importorskip("transformers")
TOOL = Path(__file__).parents[2] / "tools" / "export_hf.py"

CASES = {
    "gpt2": BASE,
    "gpt2 without biases": {**BASE, "add_bias_linear": False, "add_norm_bias": False},
    "gpt2 untied, exact gelu, 1p": {
        **BASE,
        "untie_embeddings_and_output_weights": True,
        "activation": "gelu-exact",
        "apply_layernorm_1p": True,
    },
    "gpt2 without positions, squared relu": {**BASE, "position_embedding_type": "none", "activation": "squared-relu"},
    "llama": LLAMA,
    "llama tied, grouped, wide heads": {
        **LLAMA,
        "untie_embeddings_and_output_weights": False,
        "num_query_groups": 2,
        "kv_channels": 12,
        "rotary_base": 500.0,
    },
    "llama with biases, one group": {**LLAMA, "num_query_groups": 1, "add_bias_linear": True, "layernorm_epsilon": 1e-3},
}


def save_small_model(root, settings, tp=1, dtype=torch.float32, tokenizer=None):
    arguments = (str(root), settings, tp, dtype, tokenizer)
    on_ranks(tp, save_model, *arguments) if tp > 1 else save_model(*arguments)
    return root


def open_in_transformers(directory):
    model, info = transformers.AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model.float().eval()


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_the_model_that_was_saved(tmp_path, case):
    """Saved with tp 2 where that divides; compared with the model itself, not with what was read back."""
    config = ModelConfig(**CASES[case])
    tp = 2 if config.num_query_groups % 2 == 0 else 1
    save_small_model(tmp_path / "run", CASES[case], tp)
    export_weights(find_checkpoint(tmp_path / "run"), tmp_path / "hf")
    theirs = open_in_transformers(tmp_path / "hf")
    tokens = torch.arange(2 * 48).reshape(2, 48) * 5 % 127
    assert max_difference(*gpt_logits(build(config, Axis.alone("tp")).eval(), theirs, tokens)) <= 1e-4
    about = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert about["vocab_size"] == 127 and about["tie_word_embeddings"] == (not config.untie_embeddings_and_output_weights)
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    assert ("lm_head.weight" in tensors) == config.untie_embeddings_and_output_weights
    assert tensors["transformer.wte.weight" if "gpt2" in case else "model.embed_tokens.weight"].shape == (127, 32)


def test_export_hf_writes_a_directory_that_transformers_opens(tmp_path):
    settings = {**BASE, "vocab_size": 257}
    save_small_model(tmp_path / "run", settings, tp=2, tokenizer=ByteTokenizer())
    command = [sys.executable, str(TOOL), "--load", "run", "--output", "hf"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "logits differ by at most" in done.stdout and done.stdout.endswith("exported run/iter_0000010 to hf\n")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "run"]
    model = open_in_transformers(tmp_path / "hf")
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert words("Hé", add_special_tokens=False)["input_ids"] == [72, 195, 169]
    assert model.generation_config.eos_token_id == words.eos_token_id == model.config.eos_token_id == 256
    greedy = model.generate(torch.tensor([[72, 105]]), max_new_tokens=8, do_sample=False, pad_token_id=256)
    ours = open_model(tmp_path / "run").model
    row = [72, 105]
    for _ in range(greedy.shape[1] - 2):
        row.append(int(ours.logits(ours.hidden(None, make_batch(row)))[-1, 0].argmax()))
    assert greedy[0].tolist() == row


def make_batch(row):
    tokens = torch.tensor([row])
    return Batch(tokens, tokens, torch.ones(tokens.shape), torch.arange(len(row))[None], torch.zeros(1, dtype=torch.int64))


def test_large_models_are_cut_into_files_with_an_index(tmp_path):
    save_small_model(tmp_path / "run", LLAMA)
    export_weights(find_checkpoint(tmp_path / "run"), tmp_path / "hf", shard_bytes=20_000)
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "hf").glob("model-*.safetensors"))
    assert len(files) > 3 and set(index["weight_map"].values()) == {f.name for f in files}
    assert files[-1].name == f"model-{len(files):05d}-of-{len(files):05d}.safetensors"
    held = [load_file(f) for f in files]
    assert index["metadata"]["total_size"] == sum(t.nbytes for tensors in held for t in tensors.values())
    assert all(sum(t.nbytes for t in tensors.values()) <= 20_000 for tensors in held)
    whole = export_weights(find_checkpoint(tmp_path / "run"), tmp_path / "one") and load_file(
        tmp_path / "one" / "model.safetensors"
    )
    joined = {name: tensor for tensors in held for name, tensor in tensors.items()}
    assert joined.keys() == whole.keys() and all(torch.equal(joined[n], whole[n]) for n in whole)
    open_in_transformers(tmp_path / "hf")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_exports_in_half_precision_are_proved_exactly(tmp_path, dtype):
    """The proof is exact in half precision too, since both models then hold the rounded weights."""
    said = []
    save_small_model(tmp_path / "run", CASES["gpt2 untied, exact gelu, 1p"])
    export_hf(tmp_path / "run", tmp_path / "hf", dtype=dtype, say=said.append)
    assert {t.dtype for t in load_file(tmp_path / "hf" / "model.safetensors").values()} == {dtype}
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["torch_dtype"] == str(dtype)[6:]
    assert any("logits differ" in line for line in said)


def test_a_bf16_checkpoint_stays_bf16(tmp_path):
    save_small_model(tmp_path / "run", BASE, dtype=torch.bfloat16)
    assert open_model(tmp_path / "run").model.embedding.word.weight.dtype == torch.bfloat16
    export_hf(tmp_path / "run", tmp_path / "hf", say=lambda line: None)
    assert load_file(tmp_path / "hf" / "model.safetensors")["transformer.wte.weight"].dtype == torch.bfloat16


def test_values_that_half_precision_cannot_hold(tmp_path):
    model = build(ModelConfig(**BASE), Axis.alone("tp"))
    with torch.no_grad():
        model.embedding.word.weight[0, 0] = 1e6

    config = to_json(RunSettings(model=ModelConfig(**BASE)))
    directory = save(tmp_path / "run", 1, {"model": ModuleWeights(model)}, Mesh.single(), config=config)
    with pytest.raises(CheckpointError, match=r"embedding.word.weight has values up to 1e\+06, too large for torch.float16"):
        export_weights(directory, tmp_path / "hf", torch.float16)


def test_wrong_weights_fail_the_proof(tmp_path, monkeypatch):
    """A forgotten transposition of a square matrix: shapes fit, transformers opens it, and only the logits tell."""
    save_small_model(tmp_path / "run", BASE)
    (tmp_path / "hf").mkdir()
    square = "layers.{n}.attention.dense.weight"
    assert any(row.native == square and row.conversion is CONV1D for row in GPT2.classes[0].templates)
    rows = tuple(replace(row, conversion=SAME) if row.native == square else row for row in GPT2.classes[0].templates)
    list_family(monkeypatch, with_rows(GPT2, rows))
    with pytest.raises(ExportError, match=r"the logits differ by .*, more than 0.0001. The written files are in .*hf.failed"):
        export_hf(tmp_path / "run", tmp_path / "hf", say=lambda line: None)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "hf.failed", "run"]
    assert not list((tmp_path / "hf").iterdir()) and (tmp_path / "hf.failed" / "model.safetensors").exists()


def test_a_tensor_too_few_fails_the_proof(tmp_path, monkeypatch):
    save_small_model(tmp_path / "run", {**BASE, "add_norm_bias": False})
    rows = tuple(row for row in GPT2.classes[0].templates if row.native != "final_norm.bias")
    list_family(monkeypatch, with_rows(GPT2, rows))
    with pytest.raises(ExportError, match=r"missing keys: transformer\.ln_f\.bias"):
        export_hf(tmp_path / "run", tmp_path / "hf", say=lambda line: None)


def test_tokenizers_that_disagree_fail_the_proof(tmp_path, monkeypatch):
    save_small_model(tmp_path / "run", {**BASE, "vocab_size": 257}, tokenizer=ByteTokenizer())
    write = ByteTokenizer.hf_files

    def then_change(self, directory, max_length, **more):
        write(self, directory, max_length, **more)
        monkeypatch.setattr(ByteTokenizer, "tokenize", lambda self, text: [1, 2])

    monkeypatch.setattr(ByteTokenizer, "hf_files", then_change)
    with pytest.raises(ExportError, match="the tokenizers disagree on 'The quick"):
        export_hf(tmp_path / "run", tmp_path / "hf", say=lambda line: None)


def test_an_export_overwrites_only_what_it_may(tmp_path):
    save_small_model(tmp_path / "run", BASE)
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "keep").write_text("")
    with pytest.raises(OutputError, match="is a file, not a directory"):
        export_hf(tmp_path / "run", tmp_path / "file", verify=False, overwrite=True)
    with pytest.raises(OutputError, match=r"is not empty.*--overwrite"):
        export_hf(tmp_path / "run", tmp_path / "full", verify=False)
    assert (tmp_path / "full" / "keep").exists()
    with pytest.raises(OutputError, match="not made by this project's tools"):
        export_hf(tmp_path / "run", tmp_path / "full", verify=False, overwrite=True)
    (tmp_path / "full" / "keep").unlink()
    for overwrite in (False, True):  # its own it does replace
        export_hf(tmp_path / "run", tmp_path / "full", verify=False, overwrite=overwrite)
    assert sorted(p.name for p in (tmp_path / "full").iterdir()) == [
        ".made-by-megatron",
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]


def test_what_the_tool_says(tmp_path, monkeypatch, capsys):
    def tool(*arguments):
        monkeypatch.setattr(sys, "argv", ["export_hf.py", *map(str, arguments)])
        code = runpy.run_path(str(TOOL))["main"]()
        out, err = capsys.readouterr()
        return code, out, err

    monkeypatch.setattr(os, "environ", dict(os.environ))
    run, hf = save_small_model(tmp_path / "run", BASE, tokenizer=NullTokenizer(126)), tmp_path / "hf"
    code, _, err = tool("--load", tmp_path / "ran", "--output", hf)
    assert code == 2 and err.startswith("error: ") and f"Near it: {run}" in err
    save_small_model(tmp_path / "odd", {**BASE, "position_embedding_type": "rope"})
    code, _, err = tool("--load", tmp_path / "odd", "--output", hf)
    assert code == 2 and "no Hugging Face family has this architecture" in err and "RMSNorm" in err
    assert not hf.exists() and not list(tmp_path.glob(".hf*"))
    monkeypatch.setitem(sys.modules, "transformers", None)
    code, _, err = tool("--load", run, "--output", hf)
    assert code == 1 and "transformers is not installed" in err and "--no-verify" in err and not hf.exists()
    code, out, _ = tool("--load", run, "--output", hf, "--no-verify", "--dtype", "bf16")
    assert code == 0 and "not verified" in out and "no tokenizer files: a NullTokenizer has no text" in out
    code, _, err = tool("--load", run, "--output", hf, "--no-verify")
    assert code == 2 and "not empty" in err


def test_a_model_that_its_configuration_does_not_describe(tmp_path):
    """The config.json of another run: the names or shapes that do not fit are listed."""
    model = ModuleWeights(build(ModelConfig(**BASE), Axis.alone("tp")))

    def refused(match, config):
        directory = save(tmp_path / "run", 1, {"model": model}, Mesh.single(), config=config)
        with pytest.raises(CheckpointError, match=match):
            open_model(directory)

    def changed_config(**change):
        return to_json(RunSettings(model=ModelConfig(**{**BASE, **change})))

    refused(
        r"embedding.word.weight: the checkpoint has shape \[127, 32\], requested is \[128, 32\]", changed_config(vocab_size=128)
    )
    refused(r"tensors are not in the checkpoint: model.layers.2", changed_config(num_layers=3))
    refused(r"unexpected tensors: model.layers.1", changed_config(num_layers=1))
    refused(r"config.json describes no model: .*num_layers is not resolved", changed_config(num_layers=None))
    refused("no section 'model'", {})
    refused("config.json: ", {"model": {"hidden_sise": 3}})
    directory = save(tmp_path / "run", 1, {"model": model}, Mesh.single(), config=changed_config(num_layers=1))
    with pytest.raises(CheckpointError, match=r"GPT2LMHeadModel has no place for layers.1"):
        export_weights(directory, tmp_path / "hf")
    directory = save(tmp_path / "run", 1, {"model": model}, Mesh.single(), config=changed_config(num_layers=3))
    with pytest.raises(CheckpointError, match=r"lacks tensors that its config.json asks for: layers.2.attention.dense.weight"):
        export_weights(directory, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
