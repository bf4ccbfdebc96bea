"""The released archives: converted as the old scripts did, opened by transformers, with this framework's own logits."""

import json
import os
import zipfile

import pytest
import torch
from archives import build, named_weights, read_files, released_state, small_config, write_archive
from safetensors.torch import load_file

from megatron.contract import Batch
from megatron.interop.convert_released import main
from megatron.interop.released_kinds import BERT_KIND, GPT2_KIND

transformers = pytest.importorskip("transformers")

TOKENS = torch.arange(2 * 40).reshape(2, 40) * 5 % 127
GPT_FILE = dict(n_layer=4, n_embd=32, n_head=4, n_inner=80, n_positions=48, vocab_size=127)
BERT_FILE = dict(
    num_hidden_layers=4,
    hidden_size=32,
    num_attention_heads=4,
    intermediate_size=80,
    max_position_embeddings=48,
    vocab_size=127,
)
ARGS = dict(
    num_layers=4,
    hidden_size=32,
    ffn_hidden_size=80,
    num_attention_heads=4,
    max_position_embeddings=48,
    padded_vocab_size=127,
    bias_gelu_fusion=True,
    openai_gelu=False,
    tokenizer_type="GPT2BPETokenizer",
)


def batch(tokens, segments=None):
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    return Batch(
        tokens, tokens, torch.ones(tokens.shape), positions, torch.zeros(len(tokens), dtype=torch.int64), segments=segments
    )


def open_in_transformers(kind, directory):
    model, info = kind.from_pretrained(directory, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    return model.float().eval()


def gpt_difference(model, directory):
    theirs = open_in_transformers(transformers.AutoModelForCausalLM, directory)
    with torch.no_grad():
        return (model.logits(model.hidden(None, batch(TOKENS))).transpose(0, 1) - theirs(input_ids=TOKENS).logits).abs().max()


def bert_difference(model, directory):
    theirs = open_in_transformers(transformers.MegatronBertForPreTraining, directory)
    segments = (torch.arange(40).expand_as(TOKENS) > 20).long()
    with torch.no_grad():
        hidden = model.hidden(None, batch(TOKENS, segments))
        there = theirs(input_ids=TOKENS, token_type_ids=segments)
        words = (model.logits(hidden).transpose(0, 1) - there.prediction_logits).abs().max()
        return max(words, (model.order_logits(hidden) - there.seq_relationship_logits).abs().max())


def arguments(tmp_path, path, about=None):
    if about is None:
        return [str(path)]
    (tmp_path / "sizes.json").write_text(json.dumps(about))
    return ["--config_file", str(tmp_path / "sizes.json"), str(path)]


@pytest.mark.parametrize("version", [None, 1.0, 2.0, 3.0])
def test_gpt2_of_every_version(tmp_path, version, capsys):
    """Without args in the file, sizes by --config_file, fp16, the vocabulary with 33 rows of padding."""
    config = small_config()
    model = build(config, half=True)
    path = write_archive(tmp_path / "gpt.zip", released_state(config, named_weights(model), version or 0, 160), version)
    assert main(GPT2_KIND, "", ["--print-checkpoint-structure", *arguments(tmp_path, path, GPT_FILE)]) == 0
    assert gpt_difference(model, tmp_path) <= 1e-4
    about = json.loads((tmp_path / "config.json").read_text())
    assert (about["vocab_size"], about["n_layer"], about["activation_function"]) == (127, 4, "gelu_new")
    assert about["architectures"] == ["GPT2LMHeadModel"] and about["eos_token_id"] == 50256
    assert about["summary_type"] == "cls_index"
    tensors = load_file(tmp_path / "model.safetensors")
    assert tensors["transformer.wte.weight"].shape == (127, 32) and {t.dtype for t in tensors.values()} == {torch.float16}
    assert torch.equal(tensors["lm_head.weight"], tensors["transformer.wte.weight"])
    said = capsys.readouterr().out
    assert "word_embeddings:\n        weight: 160x32 float16" in said and "no tokenizer files" in said


@pytest.mark.parametrize("version", [None, 1.0, 2.0, 3.0])
def test_bert_of_every_version(tmp_path, version):
    config = small_config(architecture="bert", activation="gelu-exact", layernorm_epsilon=1e-12)
    model = build(config, half=True)
    path = write_archive(tmp_path / "bert.zip", released_state(config, named_weights(model), version or 0, 127), version)
    assert main(BERT_KIND, "", arguments(tmp_path, path, BERT_FILE)) == 0
    assert bert_difference(model, tmp_path) <= 1e-4
    about = json.loads((tmp_path / "config.json").read_text())
    assert (about["model_type"], about["hidden_act"], about["layer_norm_eps"]) == ("megatron-bert", "gelu", 1e-12)
    for name in ("Model", "ForMaskedLM", "ForNextSentencePrediction"):
        kind = getattr(transformers, f"MegatronBert{name}")
        assert not kind.from_pretrained(tmp_path, output_loading_info=True)[1]["missing_keys"]


def test_settings_that_the_old_scripts_passed_over(tmp_path, capsys):
    """The args of the released BERT say an epsilon of 1e-5, and the published config.json 1e-12."""
    config = small_config(architecture="bert")
    args = {**ARGS, "layernorm_epsilon": 1e-5, "hidden_dropout": 0.1, "attention_dropout": 0.2}
    path = write_archive(tmp_path / "bert.zip", released_state(config, named_weights(build(config)), 3.0, 127), 3.0, args)
    assert main(BERT_KIND, "", [str(path)]) == 0
    assert "in brackets: attention_probs_dropout_prob 0.1 (0.2), layer_norm_eps 1e-12 (1e-05), hidden_act gelu (gelu). " in (
        capsys.readouterr().out
    )
    about = {**BERT_FILE, "layer_norm_eps": 1e-5, "attention_probs_dropout_prob": 0.2, "hidden_act": "gelu_new"}
    assert main(BERT_KIND, "", arguments(tmp_path, path, about)) == 0
    assert "in brackets" not in capsys.readouterr().out
    assert json.loads((tmp_path / "config.json").read_text())["layer_norm_eps"] == 1e-5


@pytest.mark.parametrize(
    ("changes", "activation", "ours"),
    [
        ({}, "gelu_fast", "gelu"),
        ({"bias_gelu_fusion": False}, "gelu", "gelu-exact"),
        ({"bias_gelu_fusion": False, "openai_gelu": True}, "gelu_new", "gelu"),
    ],
)
def test_gpt2_with_args_needs_no_other_file(tmp_path, changes, activation, ours):
    """The .pt itself; sizes and activation from the args, the vocabulary the padded one, as the old script took them."""
    config = small_config(activation=ours)
    model = build(config, half=True)
    held = released_state(config, named_weights(model), 3.0, 127)
    path = write_archive(tmp_path / "model_optim_rng.pt", held, 3.0, {**ARGS, **changes})
    assert main(GPT2_KIND, "", [str(path)]) == 0
    assert gpt_difference(model, tmp_path) <= 1e-4
    about = transformers.AutoConfig.from_pretrained(tmp_path)
    assert (about.activation_function, about.n_inner, about.tokenizer_class) == (activation, 80, "GPT2TokenizerFast")


def test_bert_with_args(tmp_path):
    config = small_config(architecture="bert", activation="gelu-exact", layernorm_epsilon=1e-12)
    model = build(config, half=True)
    args = {**ARGS, "tokenizer_type": "BertWordPieceLowerCase"}
    path = write_archive(tmp_path / "b.zip", released_state(config, named_weights(model), 3.0, 127), 3.0, args)
    assert main(BERT_KIND, "", [str(path)]) == 0
    assert bert_difference(model, tmp_path) <= 1e-4
    assert json.loads((tmp_path / "config.json").read_text())["tokenizer_type"] == "BertWordPieceLowerCase"


def test_what_a_config_file_leaves_out_means_what_it_does_in_transformers(tmp_path, capsys):
    """The config.json of GPT-2's published sizes has no n_inner: four times the width."""
    config = small_config(ffn_hidden_size=128)
    model = build(config, half=True)
    path = write_archive(tmp_path / "gpt.zip", released_state(config, named_weights(model), 0, 127), None)
    about = {name: value for name, value in GPT_FILE.items() if name != "n_inner"}
    assert main(GPT2_KIND, "", arguments(tmp_path, path, about)) == 0
    assert gpt_difference(model, tmp_path) <= 1e-4
    capsys.readouterr()
    del about["n_layer"], about["n_head"]
    said = convert_and_fail(GPT2_KIND, path, capsys, *arguments(tmp_path, path, about)[:2])
    assert "12 attention heads do not divide the width 32" in said


def test_a_released_width_needs_nothing_else(tmp_path, capsys):
    """The number of heads is known for the released models' width; the other sizes are those of the tensors."""
    config = small_config(num_layers=1, hidden_size=1024, num_attention_heads=16, num_query_groups=16, kv_channels=64)
    model = build(config, half=True)
    path = write_archive(tmp_path / "gpt.zip", released_state(config, named_weights(model), 0, 127), None)
    assert main(GPT2_KIND, "", [str(path)]) == 0
    said = capsys.readouterr().out
    assert "taken from the tensors, since the archive has no args: n_positions 48, n_layer 1, n_inner 80" in said
    about = json.loads((tmp_path / "config.json").read_text())
    assert (about["n_head"], about["n_layer"], about["vocab_size"]) == (16, 1, 127)


def test_the_tokenizer_beside_the_archive(tmp_path, capsys):
    config = small_config()
    path = write_archive(tmp_path / "gpt.zip", released_state(config, named_weights(build(config)), 0, 127), None)
    words = {letter: i for i, letter in enumerate(["a", "b", "ab", "<|endoftext|>"])}
    (tmp_path / "gpt2-vocab.json").write_text(json.dumps(words))
    (tmp_path / "gpt2-merges.txt").write_text("#version: 0.2\na b\n")
    done = main(GPT2_KIND, "", arguments(tmp_path, path, GPT_FILE))
    said = capsys.readouterr()
    assert done == 0, said.err
    assert "wrote the tokenizer from" in said.out
    assert transformers.AutoTokenizer.from_pretrained(tmp_path)("aba", add_special_tokens=False)["input_ids"] == [2, 0]


def convert_and_fail(kind, path, capsys, *more):
    before = read_files(path.parent)
    assert main(kind, "", [*more, str(path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and str(path) in said and said.count("\n") == 1
    assert read_files(path.parent) == before
    return said


def test_a_file_that_is_no_archive_is_refused(tmp_path, capsys):
    assert "there is no such file" in convert_and_fail(GPT2_KIND, tmp_path / "absent.zip", capsys)
    (tmp_path / "cut.zip").write_bytes(b"PK\x03\x04 and no more")
    assert "not a complete zip archive" in convert_and_fail(GPT2_KIND, tmp_path / "cut.zip", capsys)
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("readme.txt", "")
    assert "no release/mp_rank_00/model_optim_rng.pt in it; it holds readme.txt" in convert_and_fail(
        GPT2_KIND, tmp_path / "other.zip", capsys
    )
    (tmp_path / "text.pt").write_text("hello")
    assert "not a readable file of torch.save" in convert_and_fail(BERT_KIND, tmp_path / "text.pt", capsys)
    torch.save({"weights": {}}, tmp_path / "else.pt")
    assert "it has no `model`" in convert_and_fail(GPT2_KIND, tmp_path / "else.pt", capsys)


def test_a_file_that_was_cut_short(tmp_path, capsys):
    config = small_config()
    path = write_archive(tmp_path / "model.pt", released_state(config, named_weights(build(config)), 0, 127), None)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "not a readable file" in convert_and_fail(GPT2_KIND, path, capsys)


def test_settings_that_are_not_the_tensors(tmp_path, capsys):
    config = small_config()
    model = released_state(config, named_weights(build(config)), 0, 127)
    path = write_archive(tmp_path / "gpt.zip", model, None)
    said = convert_and_fail(GPT2_KIND, path, capsys)
    assert "does not contain the number of attention heads for the hidden size 32; give --config_file" in said
    sizes = tmp_path / "sizes.json"
    sizes.write_text(json.dumps({**GPT_FILE, "n_layer": 3, "vocab_size": 128}))
    said = convert_and_fail(GPT2_KIND, path, capsys, "--config_file", str(sizes))
    assert "n_layer 3 but 4 in the tensors, vocab_size 128 but 127 in the tensors" in said
    assert "it is not a BERT; use tools/convert_megatron_gpt2_checkpoint.py" in convert_and_fail(BERT_KIND, path, capsys)
    write_archive(path, model, 7.0)
    assert "its checkpoint_version is '7.0'; known are 0, 1.0, 2.0 and 3.0" in convert_and_fail(GPT2_KIND, path, capsys)
    write_archive(path, model, 3.0, {**ARGS, "tensor_model_parallel_size": 2})
    assert "one rank's part of a model; use tools/import_megatron.py" in convert_and_fail(GPT2_KIND, path, capsys)
    write_archive(path, model, 3.0, {**ARGS, "swiglu": True})
    assert "GPT2LMHeadModel cannot express it: --swiglu" in convert_and_fail(GPT2_KIND, path, capsys)


def test_tensors_that_are_not_the_models(tmp_path, capsys):
    """Nothing is made up for what is not there, and nothing is written that transformers cannot open."""
    config = small_config()

    def path_without(changes, args=ARGS):
        model = released_state(config, named_weights(build(config)), 0, 127)
        changes(model["language_model"]["transformer"])
        return write_archive(tmp_path / "gpt.pt", model, None, args)

    path = path_without(lambda layers: layers.pop("layers.1.mlp.dense_4h_to_h.bias"))
    assert "layers.1.mlp.down.bias is missing" in convert_and_fail(GPT2_KIND, path, capsys)
    path = path_without(lambda layers: layers.update({"layers.1.attention.dense.weight": torch.zeros(32, 16)}))
    assert "layers.1.attention.dense.weight is (32, 16), not (32, 32)" in convert_and_fail(GPT2_KIND, path, capsys)
    path = path_without(lambda layers: layers.update({"layers.0.mlp.dense_h_to_4h.weight": torch.zeros(80)}))
    assert "it holds no complete GPT-2" in convert_and_fail(GPT2_KIND, path, capsys)
    path = path_without(lambda layers: None, {**ARGS, "padded_vocab_size": "x"})
    assert "the file's args say vocab_size = 'x', which is not a number" in convert_and_fail(GPT2_KIND, path, capsys)
    torch.save({"model": [torch.zeros(2)]}, path)
    assert "it has no `model` with weights in it" in convert_and_fail(GPT2_KIND, path, capsys)


def test_args_that_do_not_say_the_sizes(tmp_path):
    config = small_config()
    model = build(config, half=True)
    path = write_archive(tmp_path / "gpt.pt", released_state(config, named_weights(model), 0, 127), None, {"lr": 1.0})
    assert main(GPT2_KIND, "", arguments(tmp_path, path, GPT_FILE)) == 0
    assert gpt_difference(model, tmp_path) <= 1e-4


class Canary:
    def __init__(self, place):
        self.place = place

    def __reduce__(self):
        return (eval, (f"open({str(self.place)!r}, 'w')",))


class SystemCanary(Canary):
    def __reduce__(self):
        return (os.system, (f"touch '{self.place}'",))


@pytest.mark.parametrize("kind", [Canary, SystemCanary])
def test_code_in_the_archive_does_not_run(tmp_path, kind, capsys):
    canary = tmp_path / "canary"
    config = small_config()
    path = tmp_path / "model.pt"
    torch.save({"model": released_state(config, named_weights(build(config)), 0, 127), "extra": kind(canary)}, path)
    main(GPT2_KIND, "", arguments(tmp_path, path, GPT_FILE))
    assert not canary.exists()
    if kind is Canary:
        said = capsys.readouterr().err
        assert "it was not read, since it asks for more than weights" in said and "add_safe_globals" not in said
        assert not (tmp_path / "config.json").exists()
