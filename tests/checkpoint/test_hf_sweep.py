"""Every field and every tensor of every family's directory, removed, changed and doubled.

Each is read as transformers reads it, or refused in words.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path
from types import NoneType

import pytest
import torch

transformers = pytest.importorskip("transformers")

import hf_models  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from megatron.checkpoint.layout import CheckpointError  # noqa: E402
from megatron.interop.checked_import import check_weights  # noqa: E402
from megatron.interop.compare_logits import (  # noqa: E402
    LogitsError,
    logit_pairs,
    model_from_weights,
    open_in_transformers,
    vocabulary_prompt,
)
from megatron.interop.families.table import family_named  # noqa: E402
from megatron.interop.hf_config import SHARED_FIELDS  # noqa: E402
from megatron.interop.hf_import import read_hf  # noqa: E402

# Fields of the classes that change nothing that a model computes: ids of tokens, caches, forms of outputs, how the same product
# is computed, the pooling of classes that are not read. The sweep proves it of each.
HARMLESS = {
    *("bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "return_dict", "output_hidden_states", "pretraining_tp"),
    *("chunk_size_feed_forward", "reorder_and_upcast_attn", "transformers_version", "label2id", "summary_type"),
    *("summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout"),
}
OF_THEIR_OWN = {"architectures", "dtype", "id2label", "problem_type", "is_encoder_decoder"}
CLASSES = {
    "gpt2": transformers.GPT2Config,
    "llama": transformers.LlamaConfig,
    "mistral": transformers.MistralConfig,
    "megatron-bert": transformers.MegatronBertConfig,
}


@pytest.mark.parametrize("kind", CLASSES)
def test_the_tables_are_those_of_the_classes(kind):
    """Every field is read or known to change nothing, and what a field means where it is left out is what the class says."""
    fields = {field.name: field for field in dataclasses.fields(CLASSES[kind])}
    table = family_named(kind).fields
    assert fields.keys() - table.keys() - HARMLESS - OF_THEIR_OWN == set()
    assert table.keys() - fields.keys() <= {"position_embedding_type"}
    for name, field in table.items():
        if name in fields:
            assert field.default == fields[name].default and type(field.default) is type(fields[name].default), name
    assert dict(family_named(kind).aliases) == CLASSES[kind].attribute_map
    assert not SHARED_FIELDS.keys() & (fields.keys() - {"is_encoder_decoder"})


@pytest.fixture(scope="module", params=hf_models.MODELS)
def model(request, tmp_path_factory):
    """(name, directory, config.json, tensors) of one of the models."""
    directory = tmp_path_factory.mktemp("foreign")
    about = hf_models.write_hf_directory(request.param, directory)
    return request.param, directory, about, load_file(directory / "model.safetensors")


def import_outcome(directory: Path, name: str) -> str:
    """`refused`, by us or by transformers, whom the import asks; `same`; else what is wrong."""
    try:
        config, weights = read_hf(directory, say=lambda line: None)
        check_weights(config, weights)
    except CheckpointError as error:
        return "refused" if len(str(error)) > 20 else f"no words: {error}"
    try:
        theirs, _ = open_in_transformers(
            directory,
            "AutoModelForCausalLM" if config.architecture == "gpt" else hf_models.MODELS[name][0],
            dtype=torch.float32,
        )
        logits = list(logit_pairs(model_from_weights(config, weights), theirs, [vocabulary_prompt(config)]))
    except LogitsError:
        return "refused"
    for here, there in logits:
        difference = (here - there).abs().max()
        if not difference <= 1e-5 * max(1.0, there.abs().max()):
            return f"the logits differ by {difference:.2e}"
    about = theirs.config
    hidden = getattr(about, "resid_pdrop", getattr(about, "hidden_dropout_prob", 0.0))
    attention = [getattr(about, n, None) for n in ("attn_pdrop", "attention_probs_dropout_prob", "attention_dropout")]
    if (config.hidden_dropout, config.attention_dropout, config.init_method_std) != (
        getattr(about, "embd_pdrop", hidden),
        next(value for value in attention if value is not None),
        about.initializer_range,
    ) or config.hidden_dropout != hidden:
        return "the dropouts or the initialisation differ"
    return "same"


LEFT_OUT = object()
ACTIVATIONS = ["gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_python", "gelu_python_tanh", "relu2", "quick_gelu"]
OTHERS = {
    "activation_function": [*ACTIVATIONS, "relu"],
    "hidden_act": [*ACTIVATIONS, "silu", "swish", "relu"],
    "architectures": [[], "LlamaForCausalLM", 5, ["MegatronBertForPreTraining"], ["MegatronBertForTokenClassification"]],
    "dtype": ["bfloat16", "float31", "int8", 5],
    "model_type": ["gpt2", "llama", "mistral", "megatron-bert", "bert"],
    "id2label": [{}, {"0": "a"}, {"0": "a", "1": "b", "2": "c"}, {"1": "a", "2": "b", "3": "c"}, ["a", "b"], {"0": 1}],
    "rope_parameters": [
        {},
        5,
        {"rope_type": "default"},
        {"rope_theta": 700.0},
        {"rope_theta": "700"},
        {"rope_theta": 0},
        {"type": "linear", "factor": 2.0},
        {"rope_type": "llama3", "factor": 8.0},
        {"rope_type": "default", "factor": 2.0, "rope_theta": 500.0},
        {"rope_type": "default", "partial_rotary_factor": 0.5, "rope_theta": 500.0},
        {"full_attention": {"rope_type": "default", "rope_theta": 500.0}},
    ],
}
# Fields that transformers did not write: of older versions, of other classes, and of the code that all share.
MORE = {
    "rope_theta": [500.0, 900, None, "x", 10**400],
    "rope_scaling": [*OTHERS["rope_parameters"], None],
    "partial_rotary_factor": [1.0, 0.5],
    "sliding_window": [4, 24, 4096, 0],
    "attention_chunk_size": [4],
    "layer_types": [["full_attention"] * 2, ["sliding_attention"] * 2, 7, [["full_attention"]] * 2],
    "is_causal": [True, False, None],
    "per_layer_config": [{"0": {"hidden_act": "relu"}}],
    "quantization_config": [{"quant_method": "gptq"}],
    "transformers_weights": ["other.safetensors"],
    "position_embedding_type": ["absolute", "relative_key"],
    "attention_bias": [True, 1],
    "mlp_bias": [True],
    "hidden_size": [32],
    "num_hidden_layers": [1, 3],
    "num_labels": [1, 2, 3, "x"],
    "problem_type": ["regression", "single_label_classification"],
    "torch_dtype": ["float16", "float31"],
    "tie_word_embeddings": [True, False],
    "n_ctx": [7],
    "return_dict": [False],
    "output_attentions": [True],
    "chunk_size_feed_forward": [4],
}


def other_values(field: str, value: object) -> list[object]:
    if field in OTHERS:
        return [LEFT_OUT, None, *OTHERS[field]]
    if field in HARMLESS:
        return [LEFT_OUT, {bool: not value, int: 5, float: 0.7, NoneType: 4}.get(type(value), "other")]
    if isinstance(value, bool):
        return [LEFT_OUT, None, not value, str(value).lower(), int(value)]
    if isinstance(value, int):
        return [LEFT_OUT, None, 2 * value, value - 1, 0, str(value), value + 0.5, True, 10**30]
    if isinstance(value, float):
        return [LEFT_OUT, None, 2 * value, 0.0, 1, str(value), float("nan"), True]
    return [LEFT_OUT, None, 3, "other", 0.5, True]


# Of models of one class, the one that has most to say.
WITH_EVERY_FIELD = ("gpt2", "llama", "mistral", "bert", "bert classes", "bert span")


@pytest.mark.parametrize("model", WITH_EVERY_FIELD, indirect=True)
def test_every_changed_field_is_read_or_refused(model, tmp_path):
    name, source, about, _ = model
    (tmp_path / "model.safetensors").symlink_to(source / "model.safetensors")
    changes = [(field, value) for field in about for value in other_values(field, about[field])]
    changes += [(field, value) for field, values in MORE.items() for value in values]
    found: Counter[str] = Counter()
    wrong = []
    for field, value in changes:
        changed = {k: v for k, v in about.items() if k != field or value is not LEFT_OUT}
        if value is not LEFT_OUT:
            changed[field] = value
        (tmp_path / "config.json").write_text(json.dumps(changed))
        result = import_outcome(tmp_path, name)
        found[result] += 1
        if result not in ("same", "refused"):
            wrong.append((field, "left out" if value is LEFT_OUT else value, result))
    assert not wrong
    assert found["same"] >= 25 and found["refused"] >= 60, found


def test_every_changed_tensor_is_read_or_refused(model, tmp_path):
    """All of what stands outside the layers and in the first; the second's have the same lines of the table."""
    name, _, about, tensors = model
    (tmp_path / "config.json").write_text(json.dumps(about))
    wrong = []

    def expect(what: str, wanted: str, changed: dict[str, torch.Tensor]) -> None:
        save_file({k: v.contiguous() for k, v in changed.items()}, tmp_path / "model.safetensors")
        if (result := import_outcome(tmp_path, name)) != wanted:
            wrong.append((what, result))

    expect("as it is", "same", tensors)
    for key, tensor in tensors.items():
        if any(f".{part}.1." in key for part in ("h", "layers", "layer")):
            continue
        expect(f"{key} doubled", "same", {**tensors, key: tensor * 2})
        expect(f"{key} without it", "refused", {k: v for k, v in tensors.items() if k != key})
        expect(f"{key} twice as long", "refused", {**tensors, key: torch.cat([tensor, tensor])})
        expect(f"{key} int8", "refused", {**tensors, key: tensor.to(torch.int8)})
        expect(f"{key} float8", "refused", {**tensors, key: tensor.to(torch.float8_e4m3fn)})
        expect(f"{key} not finite", "refused", {**tensors, key: tensor / 0})
        expect(f"{key} under another name too", "refused", {**tensors, f"{key}.copy": tensor.clone()})
    assert not wrong
