"""Megatron-LM's training checkpoints: read at any cut, written at any cut, and nothing lost on the way."""

import os
import runpy
import sys
from pathlib import Path

import pytest
import torch
from archives import build, named_weights, read_files, released_state, small_config, write_archive

from megatron.checkpoint.find import find_checkpoint
from megatron.checkpoint.layout import CheckpointError
from megatron.checkpoint.model_config import read_model_config
from megatron.interop.checked_import import write_imported
from megatron.interop.megatron_files import read_megatron, write_megatron
from megatron.interop.safe_pickle import read_pickled
from megatron.interop.whole_tensors import read_weights

TOOLS = Path(__file__).parents[2] / "tools"
CASES = {
    "gpt": {},
    "gpt exact, 1p, untied": dict(
        activation="gelu-exact", apply_layernorm_1p=True, untie_embeddings_and_output_weights=True, layernorm_epsilon=1e-6
    ),
    "llama, grouped, wide heads": dict(
        normalization="RMSNorm",
        position_embedding_type="rope",
        activation="swiglu",
        add_bias_linear=False,
        untie_embeddings_and_output_weights=True,
        num_query_groups=2,
        kv_channels=12,
        rotary_percent=0.5,
        rotary_interleaved=True,
    ),
    "no biases, no positions": dict(
        add_bias_linear=False, position_embedding_type="none", apply_residual_connection_post_layernorm=True
    ),
    "squared relu": dict(activation="squared-relu"),
    "bert": dict(architecture="bert"),
    "bert without its binary head": dict(architecture="bert", bert_binary_head=False),
}
ARGS = dict(
    num_layers=4,
    hidden_size=32,
    ffn_hidden_size=80,
    num_attention_heads=4,
    max_position_embeddings=48,
    bias_gelu_fusion=True,
    padded_vocab_size=160,
)


def equal_weights(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) and one[n].dtype == other[n].dtype for n in one)


def tool(name, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    with pytest.raises(SystemExit) as done:
        runpy.run_path(str(TOOLS / name), run_name="__main__")
    return done.value.code


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 2)])
def test_export_import_export_gives_the_same_bytes(tmp_path, monkeypatch, capsys, case, tp, pp):
    """export, import, export: the same bytes; the weights and every setting that means something are the same."""
    config = small_config(**CASES[case])
    weights = named_weights(build(config))
    write_imported(tmp_path / "ours", config, weights, iteration=10)
    cut = ("--target-tensor-parallel-size", tp, "--target-pipeline-parallel-size", pp)
    assert tool("export_megatron.py", monkeypatch, "--load", tmp_path / "ours", "--save", tmp_path / "theirs", *cut) == 0
    assert ("masked-word head uses the exact GELU" in capsys.readouterr().err) == (config.architecture == "bert")
    names = {f"mp_rank_{t:02d}" if pp == 1 else f"mp_rank_{t:02d}_{p:03d}" for t in range(tp) for p in range(pp)}
    assert {p.name for p in (tmp_path / "theirs" / "iter_0000010").iterdir()} == names
    assert tool("import_megatron.py", monkeypatch, "--load", tmp_path / "theirs", "--save", tmp_path / "back") == 0
    back = find_checkpoint(tmp_path / "back")
    assert back.name == "iter_0000010" and equal_weights(read_weights(back), weights) and read_model_config(back) == config
    assert tool("export_megatron.py", monkeypatch, "--load", tmp_path / "back", "--save", tmp_path / "again", *cut) == 0
    assert read_files(tmp_path / "again") == read_files(tmp_path / "theirs")


def test_a_rank_holds_what_megatron_lm_looks_for(tmp_path):
    config = small_config()
    weights = named_weights(build(config))
    made = write_megatron(tmp_path, 7, config, weights, tp=2, pp=2, tokenizer_type="GPT2BPETokenizer")
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "7"
    file = read_pickled(made / "mp_rank_01_001" / "model_optim_rng.pt", "file")
    args = file["args"].attributes()
    assert (file["checkpoint_version"], file["iteration"], args["padded_vocab_size"]) == (3.0, 7, 256)
    assert (args["bias_gelu_fusion"], args["openai_gelu"], args["tokenizer_type"]) == (True, False, "GPT2BPETokenizer")
    model = file["model"]
    layers = model["language_model"]["encoder"]
    assert torch.equal(layers["layers.1.self_attention.query_key_value.weight"], weights["layers.3.attention.qkv.weight"][48:])
    assert torch.equal(layers["layers.0.mlp.dense_4h_to_h.weight"], weights["layers.2.mlp.down.weight"][:, 40:])
    word = model["word_embeddings_for_head"]["weight"]
    assert word.shape == (128, 32) and (word == weights["embedding.word.weight"][-1]).all()  # padding: rows 128 to 255 of 127
    assert "embedding" not in model["language_model"]


@pytest.mark.parametrize("version", [0, 1.0, 2.0, 3.0])
@pytest.mark.parametrize("architecture", ["gpt", "bert"])
def test_files_that_others_wrote(tmp_path, version, architecture, monkeypatch, capsys):
    """Older names, every order of queries, keys and values, a foreign class among the args; `release` in the tracker."""
    config = small_config(architecture=architecture)
    weights = named_weights(build(config))
    (tmp_path / "run" / "release" / "mp_rank_00").mkdir(parents=True)
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("release\n")
    path = tmp_path / "run" / "release" / "mp_rank_00" / "model_optim_rng.pt"
    write_archive(path, released_state(config, weights, version, 160, half=False), version, ARGS)
    flags = ("--load", tmp_path / "run", "--save", tmp_path / "ours")
    assert tool("import_megatron.py", monkeypatch, *flags, "--vocab-size", 127) == 0
    assert (
        equal_weights(read_weights(find_checkpoint(tmp_path / "ours")), weights)
        and read_model_config(find_checkpoint(tmp_path / "ours")) == config
    )
    assert tool("import_megatron.py", monkeypatch, "--load", tmp_path / "run", "--save", tmp_path / "padded") == 0
    assert "keeps all 160 rows" in capsys.readouterr().err
    assert read_model_config(find_checkpoint(tmp_path / "padded")).vocab_size == 160


def test_the_tokenizer_goes_along(tmp_path, monkeypatch, capsys):
    config = small_config(vocab_size=257)
    write_megatron(tmp_path / "theirs", 3, config, named_weights(build(config)), tp=1, pp=1, tokenizer_type=None)
    flags = ("--load", tmp_path / "theirs", "--save", tmp_path / "ours", "--tokenizer-type", "ByteTokenizer")
    assert tool("import_megatron.py", monkeypatch, *flags) == 0
    assert (find_checkpoint(tmp_path / "ours") / "tokenizer" / "megatron_tokenizer.json").is_file()
    assert tool("import_megatron.py", monkeypatch, *flags[:4], "--vocab-file", "x") == 2
    assert "the tokenizer's files need --tokenizer-type" in capsys.readouterr().err


def test_virtual_stages_are_interleaved(tmp_path):
    """With four layers on two ranks with two virtual stages each, rank 0 has layers 0 and 2."""
    config = small_config()
    weights = named_weights(build(config))
    made = write_megatron(tmp_path / "four", 1, config, weights, tp=1, pp=4, tokenizer_type=None)
    parts = [read_pickled(made / f"mp_rank_00_{p:03d}" / "model_optim_rng.pt", "file")["model"] for p in range(4)]
    args = {**ARGS, "padded_vocab_size": 128, "true_vocab_size": 127}
    for rank in range(2):
        folder = tmp_path / "run" / "iter_0000001" / f"mp_rank_00_{rank:03d}"
        folder.mkdir(parents=True)
        write_archive(folder / "model_optim_rng.pt", None, 3.0, args, model0=parts[rank], model1=parts[rank + 2])
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("1")
    assert equal_weights(read_megatron(tmp_path / "run").weights, weights)


def import_and_fail(root):
    with pytest.raises(CheckpointError) as error:
        read_megatron(root)
    return str(error.value)


def test_incomplete_megatron_checkpoints_are_refused(tmp_path):
    assert "there is no such directory" in import_and_fail(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    assert "neither mp_rank_ directories nor a readable" in import_and_fail(tmp_path / "empty")
    config = small_config()
    weights = named_weights(build(config))
    made = write_megatron(tmp_path / "run", 1, config, weights, tp=2, pp=2, tokenizer_type=None)
    os.replace(made / "mp_rank_01_001", tmp_path / "away")
    assert "tensor-parallel rank 1 of pipeline stage 1 is missing; 2 x 2 ranks were saved" in import_and_fail(tmp_path / "run")
    for name in ("mp_rank_01_000", "mp_rank_00_001"):
        os.replace(made / name, tmp_path / name)
    assert "its args say tensor_model_parallel_size 2, but there are directories for 1" in import_and_fail(tmp_path / "run")
    os.replace(made / "mp_rank_00_000", made / "mp_rank_9999999999")  # what lacks is found without a list of all
    assert "tensor-parallel rank 0 of pipeline stage 0 is missing" in import_and_fail(tmp_path / "run")
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("../..")
    assert "expected a number or `release`" in import_and_fail(tmp_path / "run")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"num_experts": 8}, "a mixture of experts (--num-experts)"),
        ({"use_rotary_position_embeddings": True}, "rotary and learned positions at once"),
        ({"ffn_hidden_size": 96}, "layers.0.mlp.up.weight is (80, 32), not (96, 32)"),
        ({"num_layers": 5}, "its settings say 5 layers, but its weights have 4"),
        ({"num_layers": 10**9}, "`num_layers` is 1000000000, which makes no sense"),  # at once, and in little memory
        ({"num_layers": "4"}, "the file's args say num_layers = '4', which is not a number"),
        ({"layernorm_epsilon": -1.0}, "`--layernorm-epsilon -1.0` must be greater than 0"),
        ({"layernorm_epsilon": "1e-5"}, "the file's args say layernorm_epsilon = '1e-5', which is not a number"),
        ({"add_bias_linear": "no"}, "the file's args say add_bias_linear = 'no', which is not a switch"),
        ({"true_vocab_size": 0}, "a vocabulary of 0 tokens; it must have at least one"),
    ],
)
def test_megatron_models_without_a_counterpart_are_refused(tmp_path, monkeypatch, capsys, args, words):
    config = small_config()
    folder = tmp_path / "run" / "mp_rank_00"
    folder.mkdir(parents=True)
    model = released_state(config, named_weights(build(config)), 3.0, 127)
    write_archive(folder / "model_optim_rng.pt", model, 3.0, {**ARGS, **args})
    assert tool("import_megatron.py", monkeypatch, "--load", tmp_path / "run", "--save", tmp_path / "ours") == 2
    assert words in capsys.readouterr().err and not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("settings", "lost", "words"),
    [
        ({}, "embedding.position.weight", "no position embedding, but the file's args ask for learned positions"),
        (CASES["llama, grouped, wide heads"], "args.normalization", "no bias of the last LayerNorm, which always has one"),
    ],
)
def test_a_lost_tensor_that_would_give_another_model_is_refused(tmp_path, settings, lost, words):
    """Without it there would still be a model, of another form, that computes something else."""
    config = small_config(**settings)
    made = (
        write_megatron(tmp_path, 1, config, named_weights(build(config)), tp=1, pp=1, tokenizer_type=None)
        / "mp_rank_00"
        / "model_optim_rng.pt"
    )
    file = read_pickled(made, "file")
    args = file["args"].attributes()
    if lost == "args.normalization":
        args = {name: value for name, value in args.items() if name != "normalization"}
    else:
        del file["model"]["language_model"]["embedding"]["position_embeddings"]
    write_archive(made, file["model"], 3.0, args)
    assert f"there is {words}" in import_and_fail(tmp_path)


def test_layouts_that_megatron_lm_does_not_have(tmp_path):
    config = small_config()
    weights = named_weights(build(config))
    for tp, pp, words in (
        (3, 1, "4 attention heads cannot be divided over 3"),
        (1, 3, "4 layers cannot be divided into 3"),
        (0, 1, "1"),
    ):
        with pytest.raises(CheckpointError, match=words):
            write_megatron(tmp_path, 1, config, weights, tp=tp, pp=pp, tokenizer_type=None)
    assert not list(tmp_path.iterdir())


def test_a_copy_that_differs_is_damage(tmp_path):
    config = small_config()
    made = write_megatron(tmp_path, 1, config, named_weights(build(config)), tp=1, pp=2, tokenizer_type=None)
    path = made / "mp_rank_00_001" / "model_optim_rng.pt"
    model = read_pickled(path, "file")["model"]
    model["word_embeddings_for_head"]["weight"][0, 0] += 1
    write_archive(path, model, 3.0, ARGS)
    assert "copy of the word embeddings differs" in import_and_fail(tmp_path)
