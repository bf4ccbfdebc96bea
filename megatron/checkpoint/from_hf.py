"""A Hugging Face directory as our configuration and weights: the tables of names.py read backwards.

Read are `config.json` and safetensors files, one or several with an index. A field of config.json that asks for what the model
here does not have is refused by its name.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from safetensors import safe_open
from torch import Tensor

from megatron.checkpoint.foreign_numbers import check_config
from megatron.checkpoint.forms import Family
from megatron.checkpoint.layout import CheckpointError
from megatron.checkpoint.names import FINE_TUNED, GPT2, LLAMA, MEGATRON_BERT, MEGATRON_BERT_WORDS
from megatron.config.regular_file import MAX_INDEX_BYTES, MAX_SETTINGS_BYTES, check_regular, read_json, reason
from megatron.config.resolve import resolve
from megatron.config.schema import ModelConfig, RunConfig
from megatron.config.tasks import TASKS

ACTIVATIONS = MappingProxyType(
    {
        "gelu_new": "gelu",
        "gelu_fast": "gelu",
        "gelu_pytorch_tanh": "gelu",
        "gelu": "gelu-exact",
        "relu2": "squared-relu",
    }
)
INDEX = "model.safetensors.index.json"
# Constants that older versions of transformers saved beside the weights.
BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq", ".embeddings.position_ids")


@dataclass(frozen=True)
class Reader:
    """How one `model_type` is read.

    must: field -> the only value that the model here has; one that is absent has it. sizes: our name -> field, default None for
    none. tied: whether the output layer is the embedding's matrix where config.json does not say. prefix: of the names of a
    directory that holds the model without its head; it lacks there.
    """

    must: Mapping[str, Any]
    fields: Mapping[str, str]
    tied: bool
    prefix: str
    rest: Callable[[Mapping[str, Any]], dict[str, Any]]


def _known(about: Mapping[str, Any], field: str, kind: Any, default: Any = None) -> Any:
    """A field's value. CheckpointError when it is of another kind; null and absence mean the default."""
    value = about.get(field)
    if value is None:
        return default
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise CheckpointError(f"`{field}` of config.json is {value!r}, which makes no sense")
    return value


def _activation(about: Mapping[str, Any], field: str, default: str) -> str:
    name = _known(about, field, str, default)
    if name not in ACTIVATIONS:
        raise CheckpointError(f"`{field}` is {name!r}; the model here has {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def _gpt2(about: Mapping[str, Any]) -> dict[str, Any]:
    return {"activation": _activation(about, "activation_function", "gelu_new")}


def _bert(about: Mapping[str, Any]) -> dict[str, Any]:
    return {"architecture": "bert", "activation": _activation(about, "hidden_act", "gelu")}


def _llama(about: Mapping[str, Any]) -> dict[str, Any]:
    rope = _known(about, "rope_parameters", dict, {})
    scaling = _known(about, "rope_scaling", dict) or rope
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind != "default":
        raise CheckpointError(
            f"`rope_parameters` or `rope_scaling` asks for {kind!r}; the model here has unscaled rotary positions"
        )
    share = about.get("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0))
    if share != 1.0:
        raise CheckpointError(f"`partial_rotary_factor` is {share}; of this family the model here turns whole heads")
    bias = bool(about.get("attention_bias", False))
    if bias != bool(about.get("mlp_bias", False)):
        raise CheckpointError(
            "`attention_bias` and `mlp_bias` differ; the model here has biases in all linear layers or in none"
        )
    return {
        "normalization": "RMSNorm",
        "position_embedding_type": "rope",
        "rotary_base": float(_known(about, "rope_theta", int | float, _known(rope, "rope_theta", int | float, 10000.0))),
        "activation": "swiglu",
        "add_bias_linear": bias,
        "num_query_groups": _known(about, "num_key_value_heads", int),
        "kv_channels": _known(about, "head_dim", int),
    }


_LLAMA = Reader(
    MappingProxyType({"hidden_act": "silu", "sliding_window": None}),
    MappingProxyType(
        {
            "vocab_size": "vocab_size",
            "max_position_embeddings": "max_position_embeddings",
            "hidden_size": "hidden_size",
            "ffn_hidden_size": "intermediate_size",
            "num_layers": "num_hidden_layers",
            "num_attention_heads": "num_attention_heads",
            "layernorm_epsilon": "rms_norm_eps",
            "attention_dropout": "attention_dropout",
            "init_method_std": "initializer_range",
        }
    ),
    False,
    "model.",
    _llama,
)
READERS: Mapping[str, Reader] = MappingProxyType(
    {
        "gpt2": Reader(
            MappingProxyType(
                {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}
            ),
            MappingProxyType(
                {
                    "vocab_size": "vocab_size",
                    "max_position_embeddings": "n_positions",
                    "hidden_size": "n_embd",
                    "ffn_hidden_size": "n_inner",
                    "num_layers": "n_layer",
                    "num_attention_heads": "n_head",
                    "layernorm_epsilon": "layer_norm_epsilon",
                    "hidden_dropout": "resid_pdrop",
                    "attention_dropout": "attn_pdrop",
                    "init_method_std": "initializer_range",
                }
            ),
            True,
            "transformer.",
            _gpt2,
        ),
        "llama": _LLAMA,
        "mistral": _LLAMA,
        "megatron-bert": Reader(
            MappingProxyType(
                {
                    "type_vocab_size": 2,
                    "position_embedding_type": "absolute",
                    "is_decoder": False,
                    "add_cross_attention": False,
                    "tie_word_embeddings": True,
                }
            ),
            MappingProxyType(
                {
                    "vocab_size": "vocab_size",
                    "max_position_embeddings": "max_position_embeddings",
                    "hidden_size": "hidden_size",
                    "ffn_hidden_size": "intermediate_size",
                    "num_layers": "num_hidden_layers",
                    "num_attention_heads": "num_attention_heads",
                    "layernorm_epsilon": "layer_norm_eps",
                    "hidden_dropout": "hidden_dropout_prob",
                    "attention_dropout": "attention_probs_dropout_prob",
                    "init_method_std": "initializer_range",
                }
            ),
            True,
            "bert.",
            _bert,
        ),
    }
)
NEEDED = ("vocab_size", "max_position_embeddings", "hidden_size", "num_layers", "num_attention_heads")


def read_hf(directory: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The resolved configuration and the weights, under our names, of a directory that transformers wrote.

    CheckpointError naming the field, the tensor or the file that stands in the way.
    """
    about = _json(directory / "config.json")
    check_config(about, str(directory / "config.json"))
    kind = str(about.get("model_type"))
    if kind == "bert":
        raise CheckpointError(
            f"{directory}: `model_type` is 'bert', whose layer norms follow each layer; here they come first, as in "
            "'megatron-bert', and weights of the one make no sense in the other"
        )
    if kind not in READERS:
        raise CheckpointError(f"{directory}: `model_type` is {kind!r}; known are {', '.join(sorted(READERS))}")
    try:
        found = _tensors(directory, READERS[kind].prefix)
        return _read(about, READERS[kind], found)
    except CheckpointError as error:
        raise error if str(directory) in str(error) else CheckpointError(f"{directory}: {error}") from error


def _read(about: Mapping[str, Any], reader: Reader, found: dict[str, Tensor]) -> tuple[ModelConfig, dict[str, Tensor]]:
    tied = bool(about.get("tie_word_embeddings", reader.tied))
    config = _config(about, reader, tied)
    family = GPT2 if reader.prefix == "transformer." else LLAMA
    if config.architecture == "bert":
        config, family = _bert_family(config, found, about)
    copies = {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias"} | ({"lm_head.weight"} if tied else set())
    weights: dict[str, Tensor] = {}
    used: set[str] = set()
    for row in family.table(config):
        if row.ours == "head.weight" and tied:
            continue
        if row.ours.endswith(".bias") and ".norm" not in row.ours and not config.add_bias_linear and row.zeros is None:
            continue
        if all(name not in found for name in row.theirs) and row.ours.endswith("norm.bias") and row.zeros is None:
            continue
        if lacking := [name for name in row.theirs if name not in found]:
            raise CheckpointError(f"there is no tensor {lacking[0]}, which {family.architecture} has; save it from that class")
        try:
            weights[row.ours] = row.form.read(tuple(found[name] for name in row.theirs), config).contiguous()
        except RuntimeError as error:
            raise CheckpointError(f"{row.theirs[0]}: its shape does not fit config.json") from error
        used |= set(row.theirs)
    if left := sorted(found.keys() - used - copies):
        raise CheckpointError(
            f"{family.architecture} has no tensor {', '.join(left[:10])}; it is another model than config.json says"
        )
    return config, weights


def _bert_family(config: ModelConfig, found: dict[str, Tensor], about: Mapping[str, Any]) -> tuple[ModelConfig, Family]:
    """Fine-tuned, with the binary head, or without. Without it the model here has no token types; then those there must mean
    nothing."""
    named = (about.get("architectures") or [None])[0]
    head = next((head for head, family in FINE_TUNED.items() if family.architecture == named), None)
    if head is not None:
        return replace(config, task_head=head, labels=_labels(head, found, about)), FINE_TUNED[head]
    if any(name.startswith(("bert.pooler.", "cls.seq_relationship.")) for name in found):
        return config, MEGATRON_BERT
    types = found.get("bert.embeddings.token_type_embeddings.weight")
    if types is not None and types.any():
        raise CheckpointError(
            "it has token types and no cls.seq_relationship; open it as MegatronBertForPreTraining and save it, and import that"
        )
    rows = tuple(row for row in MEGATRON_BERT_WORDS.rows if row.ours != "embedding.segment.weight")
    found.pop("bert.embeddings.token_type_embeddings.weight", None)
    family = Family(MEGATRON_BERT_WORDS.architecture, rows, MEGATRON_BERT_WORDS.obstacles, MEGATRON_BERT_WORDS.config)
    return replace(config, bert_binary_head=False), family


def _labels(head: str, found: Mapping[str, Tensor], about: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of the classes: of config.json, or those that transformers gives where nobody named them."""
    if head == "span":
        return ()
    if head == "choice":  # transformers knows no number of choices
        return TASKS["RACE"].labels
    weight, names = found.get("classifier.weight"), about.get("id2label") or {}
    count = weight.shape[0] if weight is not None and weight.dim() else 0
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise CheckpointError("`id2label` of config.json names no classes")
    return tuple(names.get(str(number), f"LABEL_{number}") for number in range(count))


def _config(about: Mapping[str, Any], reader: Reader, tied: bool) -> ModelConfig:
    for field, only in reader.must.items():
        if about.get(field, only) != only:
            raise CheckpointError(f"`{field}` is {about[field]!r}; the model here has {only!r} only")
    if about.get("quantization_config"):
        raise CheckpointError("`quantization_config`: its weights are quantized; import the original")
    values = {ours: _known(about, field, int | float) for ours, field in reader.fields.items() if about.get(field) is not None}
    for ours in NEEDED:
        if type(values.get(ours)) is not int or values[ours] < 1:
            raise CheckpointError(f"`{reader.fields[ours]}` of config.json is {values.get(ours)!r}; it must be a number")
    values.setdefault("ffn_hidden_size", 4 * values["hidden_size"])
    model = ModelConfig(**values, **reader.rest(about), untie_embeddings_and_output_weights=not tied)
    model = resolve(RunConfig(model=model)).model
    if model.kv_channels is None:
        raise CheckpointError(f"{model.num_attention_heads} attention heads do not divide the width {model.hidden_size}")
    return model


def _json(path: Path, max_bytes: int = MAX_SETTINGS_BYTES) -> dict[str, Any]:
    try:
        values = read_json(path, max_bytes)
    except FileNotFoundError as error:
        why = f"{path} is {error.strerror}" if path.is_symlink() else f"there is no {path.name} in it"
        raise CheckpointError(f"{path.parent}: {why}") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable: {reason(error)}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return values


def _tensors(directory: Path, prefix: str) -> dict[str, Tensor]:
    """All tensors in the directory's safetensors files, without the constants, with the prefix that a bare model lacks."""
    if os.path.lexists(directory / "model.safetensors"):
        names = ["model.safetensors"]
    elif os.path.lexists(directory / INDEX):
        where = _json(directory / INDEX, MAX_INDEX_BYTES).get("weight_map")
        files = where.values() if isinstance(where, dict) else ()
        names = sorted({name for name in files if isinstance(name, str) and Path(name).name == name})
        if not names or any(name not in names for name in files):
            raise CheckpointError(f"{directory / INDEX}: its weight_map does not name files of this directory")
    else:
        pickled = sorted(p.name for p in directory.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
        held = f"{pickled[0]} is a pickle, which can run code, and is not read" if pickled else "there is no model.safetensors"
        raise CheckpointError(
            f"{directory}: {held}; open the model with transformers and save_pretrained it, to have safetensors"
        )
    found: dict[str, Tensor] = {}
    for name in names:
        try:
            check_regular(directory / name)
            with safe_open(str(directory / name), framework="pt") as file:
                found |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no dictionary
        except Exception as error:  # the package raises its own kind and others
            raise CheckpointError(f"{directory / name}: not a readable safetensors file: {reason(error)}") from error
    found = {key: tensor for key, tensor in found.items() if not key.endswith(BUFFERS)}
    if not any(key.startswith(prefix) for key in found):
        found = {key if key.startswith(("lm_head.", "cls.")) else prefix + key: tensor for key, tensor in found.items()}
    return found
