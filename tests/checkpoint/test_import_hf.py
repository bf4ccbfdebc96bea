"""Hugging Face directories as checkpoints: what transformers computes is computed here, and nothing is lost on the way."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from archives import build, named_weights, small_config
from models import max_difference
from safetensors.torch import load_file, save_file

from megatron.checkpoint.find import find_checkpoint
from megatron.checkpoint.layout import CheckpointError
from megatron.data.tokenizer import ByteTokenizer
from megatron.inference.restore import open_model
from megatron.interop.checked_import import write_imported
from megatron.interop.compare_logits import gpt_logits
from megatron.interop.hf_export import export_weights
from megatron.interop.hf_import import read_hf
from megatron.interop.whole_tensors import read_weights

transformers = pytest.importorskip("transformers")
TOOL = Path(__file__).parents[2] / "tools" / "import_hf.py"
LLAMA = dict(
    normalization="RMSNorm",
    position_embedding_type="rope",
    activation="swiglu",
    add_bias_linear=False,
    untie_embeddings_and_output_weights=True,
)
CASES = {
    "gpt2": {},
    "gpt2 without biases, untied, 1p": dict(
        add_bias_linear=False,
        add_norm_bias=False,
        untie_embeddings_and_output_weights=True,
        activation="gelu-exact",
        apply_layernorm_1p=True,
    ),
    "gpt2 without positions": dict(position_embedding_type="none", activation="squared-relu"),
    "llama": LLAMA,
    "llama tied, grouped, biases": dict(
        LLAMA,
        untie_embeddings_and_output_weights=False,
        num_query_groups=2,
        kv_channels=12,
        add_bias_linear=True,
        rotary_base=500.0,
    ),
    "bert": dict(architecture="bert", activation="gelu-exact", layernorm_epsilon=1e-12),
    "bert without its binary head": dict(architecture="bert", bert_binary_head=False),
}


def run_import(source, save, monkeypatch, *more):
    monkeypatch.setattr(sys, "argv", ["import_hf.py", "--input", str(source), "--save", str(save), *more])
    with pytest.raises(SystemExit) as done:
        runpy.run_path(str(TOOL), run_name="__main__")
    return done.value.code


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_export_import_export_gives_equal_bytes(tmp_path, monkeypatch, case, dtype):
    config = small_config(**CASES[case])
    write_imported(tmp_path / "ours", config, {n: t.to(dtype) for n, t in named_weights(build(config)).items()}, iteration=10)
    export_weights(find_checkpoint(tmp_path / "ours"), tmp_path / "hf", shard_bytes=20_000)
    assert run_import(tmp_path / "hf", tmp_path / "back", monkeypatch) == 0
    export_weights(find_checkpoint(tmp_path / "back"), tmp_path / "again", shard_bytes=20_000)
    files = sorted(p.name for p in (tmp_path / "hf").iterdir())
    assert len(files) > 4 and files == sorted(p.name for p in (tmp_path / "again").iterdir())
    for name in files:
        assert (tmp_path / "hf" / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


def write_transformers_model(kind, tmp_path):
    """A directory that transformers itself wrote, of a model with random weights."""
    torch.manual_seed(1)
    if kind == "gpt2":
        config = transformers.GPT2Config(vocab_size=127, n_positions=48, n_embd=32, n_layer=2, n_head=4)
    else:
        config = transformers.LlamaConfig(
            vocab_size=127,
            max_position_embeddings=48,
            hidden_size=32,
            intermediate_size=80,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path / kind)
    return model, tmp_path / kind


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_what_transformers_wrote_computes_the_same_here(tmp_path, monkeypatch, kind):
    model, source = write_transformers_model(kind, tmp_path)
    ByteTokenizer().hf_files(tmp_path / "words", 48)
    assert run_import(source, tmp_path / "ours", monkeypatch) == 0
    tokens = torch.arange(2 * 40).reshape(2, 40) * 5 % 127
    assert max_difference(*gpt_logits(open_model(tmp_path / "ours").model, model, tokens)) <= 1e-4


def test_names_of_the_bare_model_and_its_constants(tmp_path):
    """As the published GPT-2 has them: no prefix, and the causal mask among the tensors."""
    _, source = write_transformers_model("gpt2", tmp_path)
    whole = read_hf(source)[1]
    tensors = load_file(source / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items() if name != "lm_head.weight"}
    save_file({**bare, "h.0.attn.bias": torch.ones(1, 1, 48, 48)}, source / "model.safetensors")
    again = read_hf(source)[1]
    assert again.keys() == whole.keys() and all(torch.equal(again[n], whole[n]) for n in whole)


def test_the_tokenizer_comes_along(tmp_path, monkeypatch, capsys):
    config = small_config(vocab_size=300)
    write_imported(tmp_path / "ours", config, named_weights(build(config)))
    export_weights(find_checkpoint(tmp_path / "ours"), tmp_path / "hf")
    ByteTokenizer().hf_files(tmp_path / "hf", 48)
    assert run_import(tmp_path / "hf", tmp_path / "all", monkeypatch) == 0
    assert "the tokenizer has 257 tokens, the model 300" in capsys.readouterr().err
    assert run_import(tmp_path / "hf", tmp_path / "cut", monkeypatch, "--vocab-size", "257") == 0
    opened = open_model(tmp_path / "cut")
    assert opened.tokenizer.tokenize("Hé") == [72, 195, 169] and opened.config.vocab_size == 257
    assert read_weights(find_checkpoint(tmp_path / "cut"))["embedding.word.weight"].shape == (257, 32)


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("gpt2", {"activation_function": "relu"}, "`activation_function` is 'relu'"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "`scale_attn_by_inverse_layer_idx` is True"),
        ("gpt2", {"activation_function": ["relu"]}, "`activation_function` of config.json is ['relu'], which makes no sense"),
        ("gpt2", {"layer_norm_epsilon": "1e-5"}, "`layer_norm_epsilon` of config.json is '1e-5', which makes no sense"),
        ("gpt2", {"n_head": 5}, "5 attention heads do not divide the width 32"),
        ("gpt2", {"resid_pdrop": 1.5, "embd_pdrop": 1.5}, "`--hidden-dropout 1.5` must be at least 0 and less than 1"),
        ("llama", {"rope_parameters": 5}, "`rope_parameters` of config.json is 5, which makes no sense"),
        ("llama", {"num_key_value_heads": "2"}, "`num_key_value_heads` of config.json is '2', which makes no sense"),
        ("gpt2", {"n_layer": 3}, "there is no tensor transformer.h.2.ln_1.weight"),
        ("gpt2", {"n_layer": 1}, "has no tensor transformer.h.1"),
        ("gpt2", {"n_positions": 47}, "embedding.position.weight is (48, 32), not (47, 32)"),
        ("gpt2", {"model_type": "bert"}, "whose layer norms follow each sublayer"),
        ("gpt2", {"model_type": "t5"}, "`model_type` is 't5'; known are gpt2, llama, megatron-bert, mistral"),
        ("llama", {"hidden_act": "gelu"}, "`hidden_act` is 'gelu'; the model here has 'silu' only"),
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "asks for 'llama3'"),
        ("llama", {"attention_bias": True}, "`attention_bias` and `mlp_bias` differ"),
        ("llama", {"hidden_size": "wide"}, "`hidden_size` of config.json is 'wide'"),
    ],
)
def test_what_the_model_here_is_not(tmp_path, monkeypatch, capsys, kind, changes, words):
    source = write_transformers_model(kind, tmp_path)[1]
    about = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**about, **changes}))
    assert run_import(source, tmp_path / "ours", monkeypatch) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "ours").exists()


def test_pickles_and_damage(tmp_path):
    source = write_transformers_model("gpt2", tmp_path)[1]
    weights = source / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match=r"model.safetensors: not a readable safetensors file"):
        read_hf(source)
    weights.unlink()
    torch.save({}, source / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin is a pickle.*save_pretrained"):
        read_hf(source)
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../away.safetensors"}}))
    with pytest.raises(CheckpointError, match="does not name files of this directory"):
        read_hf(source)
    with pytest.raises(CheckpointError, match=r"there is no config.json in it"):
        read_hf(tmp_path)
