"""config.json of a Hugging Face directory as our configuration, read as the family's class in transformers reads it.

A family's table holds every field that its class computes with, and the class's default, which an absent field has. A field
is read, or has one value here and every other is refused. What the class does not know it ignores, and so do we, but for a few
fields that code shared by all classes looks for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isfinite
from types import MappingProxyType, UnionType
from typing import Any

from megatron.checkpoint.layout import CheckpointError
from megatron.config.resolve import resolve
from megatron.config.schema import ModelConfig, RunConfig

ACTIVATIONS = MappingProxyType(
    {
        "gelu_new": "gelu",
        "gelu_fast": "gelu",
        "gelu_pytorch_tanh": "gelu",
        "gelu_python_tanh": "gelu",
        "gelu": "gelu-exact",
        "gelu_python": "gelu-exact",
        "relu2": "squared-relu",
    }
)
DTYPES = ("float64", "float32", "float16", "bfloat16")
MAX_SIZE = 2**31 - 1
MAX_CLASSES = 1 << 20


@dataclass(frozen=True)
class Field:
    """A field of a class. null is legal where the default is None.

    kind: the types that transformers accepts for it. ours: the name of the same setting here, where one exists.
    fixed: the default is the only value that the model here has.
    """

    kind: type | UnionType
    default: Any
    ours: str | None = None
    fixed: bool = False


NUMBER = int | float
GPT2_FIELDS: Mapping[str, Field] = MappingProxyType(
    {
        "vocab_size": Field(int, 50257, "vocab_size"),
        "n_positions": Field(int, 1024, "max_position_embeddings"),
        "n_embd": Field(int, 768, "hidden_size"),
        "n_layer": Field(int, 12, "num_layers"),
        "n_head": Field(int, 12, "num_attention_heads"),
        "n_inner": Field(int, None, "ffn_hidden_size"),
        "activation_function": Field(str, "gelu_new"),
        "resid_pdrop": Field(NUMBER, 0.1, "hidden_dropout"),
        "embd_pdrop": Field(NUMBER, 0.1),
        "attn_pdrop": Field(NUMBER, 0.1, "attention_dropout"),
        "layer_norm_epsilon": Field(float, 1e-5, "layernorm_epsilon"),
        "initializer_range": Field(float, 0.02, "init_method_std"),
        "scale_attn_weights": Field(bool, True, fixed=True),
        "scale_attn_by_inverse_layer_idx": Field(bool, False, fixed=True),
        "add_cross_attention": Field(bool, False, fixed=True),
        "tie_word_embeddings": Field(bool, True),
    }
)
_LLAMA_AND_MISTRAL: Mapping[str, Field] = MappingProxyType(
    {
        "vocab_size": Field(int, 32000, "vocab_size"),
        "hidden_size": Field(int, 4096, "hidden_size"),
        "num_hidden_layers": Field(int, 32, "num_layers"),
        "num_attention_heads": Field(int, 32, "num_attention_heads"),
        "head_dim": Field(int, None, "kv_channels"),
        "hidden_act": Field(str, "silu"),
        "initializer_range": Field(float, 0.02, "init_method_std"),
        "rms_norm_eps": Field(float, 1e-6, "layernorm_epsilon"),
        "tie_word_embeddings": Field(bool, False),
        "rope_parameters": Field(dict, None),
        "attention_dropout": Field(NUMBER, 0.0, "attention_dropout"),
    }
)
LLAMA_FIELDS: Mapping[str, Field] = MappingProxyType(
    {
        **_LLAMA_AND_MISTRAL,
        "intermediate_size": Field(int, 11008, "ffn_hidden_size"),
        "num_key_value_heads": Field(int, None, "num_query_groups"),
        "max_position_embeddings": Field(int, 2048, "max_position_embeddings"),
        "attention_bias": Field(bool, False),
        "mlp_bias": Field(bool, False),
    }
)
MISTRAL_FIELDS: Mapping[str, Field] = MappingProxyType(
    {
        **_LLAMA_AND_MISTRAL,
        "intermediate_size": Field(int, 14336, "ffn_hidden_size"),
        "num_key_value_heads": Field(int, 8, "num_query_groups"),
        "max_position_embeddings": Field(int, 131072, "max_position_embeddings"),
        "sliding_window": Field(int | None, 4096),
    }
)
MEGATRON_BERT_FIELDS: Mapping[str, Field] = MappingProxyType(
    {
        "vocab_size": Field(int, 29056, "vocab_size"),
        "hidden_size": Field(int, 1024, "hidden_size"),
        "num_hidden_layers": Field(int, 24, "num_layers"),
        "num_attention_heads": Field(int, 16, "num_attention_heads"),
        "intermediate_size": Field(int, 4096, "ffn_hidden_size"),
        "hidden_act": Field(str, "gelu"),
        "hidden_dropout_prob": Field(NUMBER, 0.1, "hidden_dropout"),
        "attention_probs_dropout_prob": Field(NUMBER, 0.1, "attention_dropout"),
        "max_position_embeddings": Field(int, 512, "max_position_embeddings"),
        "type_vocab_size": Field(int, 2, fixed=True),
        "initializer_range": Field(float, 0.02, "init_method_std"),
        "layer_norm_eps": Field(float, 1e-12, "layernorm_epsilon"),
        "is_decoder": Field(bool, False, fixed=True),
        "add_cross_attention": Field(bool, False, fixed=True),
        "tie_word_embeddings": Field(bool, True, fixed=True),
        "position_embedding_type": Field(str, "absolute", fixed=True),  # of Transformers 4
    }
)
# What no class need know: code that all share looks for it, in transformers 4 or 5. The values that mean nothing.
SHARED: Mapping[str, Callable[[Any], bool]] = MappingProxyType(
    {
        "quantization_config": lambda v: not v,
        "per_layer_config": lambda v: not v,
        "pruned_heads": lambda v: not v,
        "transformers_weights": lambda v: v is None,
        "fusion_config": lambda v: not v,
        "is_encoder_decoder": lambda v: v in (None, False),
        "attention_chunk_size": lambda v: v is None,
        "layer_types": lambda v: v is None or (isinstance(v, list) and all(kind == "full_attention" for kind in v)),
    }
)


@dataclass(frozen=True)
class ConfigReader:
    """The way in which the config.json of one `model_type` is read.

    fields: all that the class computes with. aliases: other names of fields, which transformers takes for them. causal: what
    `is_causal` may say. rest: the settings that follow from more than one field, given the fields' values and the whole file.
    """

    fields: Mapping[str, Field]
    aliases: Mapping[str, str]
    causal: bool
    rest: Callable[[Mapping[str, Any], Mapping[str, Any]], dict[str, Any]]


def _activation(name: str, field: str) -> str:
    if name not in ACTIVATIONS:
        raise CheckpointError(f"`{field}` is {name!r}; the model here has {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def _gpt2(values: Mapping[str, Any], about: Mapping[str, Any]) -> dict[str, Any]:
    if values["embd_pdrop"] != values["resid_pdrop"]:
        raise CheckpointError(
            f"`embd_pdrop` is {values['embd_pdrop']} and `resid_pdrop` {values['resid_pdrop']}; the model here has one dropout "
            "for both, which only training knows: write the one that you want into both"
        )
    return {
        "activation": _activation(values["activation_function"], "activation_function"),
        "ffn_hidden_size": 4 * values["n_embd"] if values["n_inner"] is None else values["n_inner"],
    }


def _bert(values: Mapping[str, Any], about: Mapping[str, Any]) -> dict[str, Any]:
    return {"architecture": "bert", "activation": _activation(values["hidden_act"], "hidden_act")}


def _llama(values: Mapping[str, Any], about: Mapping[str, Any]) -> dict[str, Any]:
    if values["hidden_act"] not in ("silu", "swish"):
        raise CheckpointError(f"`hidden_act` is {values['hidden_act']!r}; the model here has 'silu' only")
    bias = values.get("attention_bias", False)
    if bias != values.get("mlp_bias", False):
        raise CheckpointError(
            "`attention_bias` and `mlp_bias` differ; the model here has biases in all linear layers or in none"
        )
    window = values.get("sliding_window")
    if window is not None and window < values["max_position_embeddings"]:
        left_out = "" if "sliding_window" in about else ", which it is where it is left out"
        raise CheckpointError(
            f"`sliding_window` is {window}{left_out}; the model here sees all {values['max_position_embeddings']} positions"
        )
    return {
        "normalization": "RMSNorm",
        "position_embedding_type": "rope",
        "rotary_base": rotary_base(about),
        "activation": "swiglu",
        "add_bias_linear": bias,
        "hidden_dropout": 0.0,  # the family has none
    }


def _llama_alone(values: Mapping[str, Any], about: Mapping[str, Any]) -> dict[str, Any]:
    heads, width = values["num_attention_heads"], values["hidden_size"]
    if width % heads:
        raise CheckpointError(f"{heads} attention heads do not divide the width {width}")
    if about.get("sliding_window") is not None:
        raise CheckpointError(f"`sliding_window` is {about['sliding_window']!r}; the model here has None only")
    return _llama(values, about)


def rotary_base(about: Mapping[str, Any]) -> float:
    """The base of unscaled rotary positions, as Transformers 5 reads it.

    It can stand in `rope_scaling`, which goes before `rope_parameters` where it is not empty, and in `rope_theta`, the only one
    that Transformers 4 reads. CheckpointError where one of them says another base, and for positions that are scaled.
    """
    said = {"rope_theta": about["rope_theta"]} if "rope_theta" in about else {}
    shares = [about.get("partial_rotary_factor")]
    for name in ("rope_parameters", "rope_scaling"):
        table = about.get(name)
        if table is None:
            continue
        if not isinstance(table, dict):
            raise CheckpointError(f"`{name}` of config.json is {table!r}, which makes no sense")
        _refuse_scaled(name, table)
        shares.append(table.get("partial_rotary_factor"))
        if "rope_theta" in table:
            said[f"{name}.rope_theta"] = table["rope_theta"]
    if strange := [share for share in shares if share not in (None, 1)]:
        raise CheckpointError(f"`partial_rotary_factor` is {strange[0]!r}; of this family the model here turns whole heads")
    for name, value in said.items():
        if not isinstance(value, NUMBER) or isinstance(value, bool) or not 0 < value < 1e30:
            raise CheckpointError(f"`{name}` of config.json is {value!r}, which makes no sense")
    table = about.get("rope_scaling") or about.get("rope_parameters") or {}
    base = float(table.get("rope_theta", said.get("rope_theta", 10000.0)))
    if any(value != base for value in said.values()):
        listed = " and ".join(f"`{name}` is {value}" for name, value in said.items())
        raise CheckpointError(
            f"{listed}: Transformers 5 takes {base:g}, and other versions may not; leave only the right one in config.json"
        )
    return base


def _refuse_scaled(name: str, table: Mapping[str, Any]) -> None:
    for key, value in table.items():
        if key in ("rope_theta", "partial_rotary_factor") or value is None:
            continue
        if key in ("rope_type", "type") and value != "default":
            raise CheckpointError(f"`{name}` asks for {value!r}; the model here has unscaled rotary positions")
        if key not in ("rope_type", "type") and value != 1:  # a factor of 1 scales nothing
            raise CheckpointError(f"`{name}` says {key} = {value!r}; the model here has unscaled rotary positions")


CONFIG_READERS: Mapping[str, ConfigReader] = MappingProxyType(
    {
        "gpt2": ConfigReader(
            GPT2_FIELDS,
            MappingProxyType(
                {
                    "hidden_size": "n_embd",
                    "max_position_embeddings": "n_positions",
                    "num_attention_heads": "n_head",
                    "num_hidden_layers": "n_layer",
                }
            ),
            True,
            _gpt2,
        ),
        "llama": ConfigReader(LLAMA_FIELDS, MappingProxyType({}), True, _llama_alone),
        "mistral": ConfigReader(MISTRAL_FIELDS, MappingProxyType({}), True, _llama),
        "megatron-bert": ConfigReader(MEGATRON_BERT_FIELDS, MappingProxyType({}), False, _bert),
    }
)


def model_settings(about: Mapping[str, Any], reader: ConfigReader) -> ModelConfig:
    """The resolved configuration that config.json describes, tied as it says; of a BERT the one with the binary head.

    CheckpointError naming the field that makes no sense, or asks for what the model here does not have.
    """
    values = _values(about, reader)
    own = {field.ours: values[name] for name, field in reader.fields.items() if field.ours is not None}
    model = ModelConfig(
        **{**own, **reader.rest(values, about)},
        untie_embeddings_and_output_weights=not values["tie_word_embeddings"],
    )
    model = resolve(RunConfig(model=model)).model
    if model.kv_channels is None:
        raise CheckpointError(f"{model.num_attention_heads} attention heads do not divide the width {model.hidden_size}")
    return model


def _values(about: Mapping[str, Any], reader: ConfigReader) -> dict[str, Any]:
    """The value of every field of the family's class."""
    for name, harmless in SHARED.items():
        if name in about and not harmless(about[name]):
            raise CheckpointError(f"`{name}` is {str(about[name])[:80]}; the model here has no such thing")
    # null is false there: not causal
    if "is_causal" in about and bool(about["is_causal"]) is not reader.causal:
        raise CheckpointError(f"`is_causal` is {about['is_causal']!r}; the model here has {reader.causal!r} only")
    given = dict(about)
    for alias, name in reader.aliases.items():
        if alias in about and given.setdefault(name, about[alias]) != about[alias]:
            raise CheckpointError(f"`{alias}` is {about[alias]!r} and `{name}` {about[name]!r}, which are one and the same")
    values = {}
    for name, field in reader.fields.items():
        values[name] = value = given.get(name, field.default)
        if value is None and field.default is None:
            continue
        kinds_differ = isinstance(value, bool) != (field.kind is bool)
        if not isinstance(value, field.kind) or kinds_differ or (isinstance(value, float) and not isfinite(value)):
            raise CheckpointError(f"`{name}` of config.json is {value!r}, which makes no sense")
        if field.fixed and value != field.default:
            raise CheckpointError(f"`{name}` is {value!r}; the model here has {field.default!r} only")
        if type(value) is int and not isinstance(field.default, float) and not 1 <= value <= MAX_SIZE:
            raise CheckpointError(f"`{name}` of config.json is {value!r}; it must be a number from 1 to {MAX_SIZE}")
    return values


def architecture(about: Mapping[str, Any]) -> str | None:
    """The class that a directory was saved from; None where it does not say."""
    named = about.get("architectures")
    if named is None or named == []:
        return None
    if not isinstance(named, list) or any(not isinstance(name, str) for name in named):
        raise CheckpointError(f"`architectures` of config.json is {named!r}; it must be a list of names")
    return str(named[0])


def saved_dtype(about: Mapping[str, Any]) -> str | None:
    """The type that transformers gives the weights when it opens the directory; None where it takes that of the tensors."""
    name = about.get("dtype") if about.get("dtype") is not None else about.get("torch_dtype")
    if name is not None and name not in DTYPES:
        raise CheckpointError(f"`dtype` of config.json is {name!r}; known are {', '.join(DTYPES)}")
    return name


def class_names(about: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of the classes that a task's head tells apart, those that transformers gives where nobody named them."""
    named, count = about.get("id2label"), about.get("num_labels")
    if named is not None and (not isinstance(named, dict) or not all(isinstance(name, str) for name in named.values())):
        raise CheckpointError("`id2label` of config.json names no classes")
    if count is not None and (type(count) is not int or not 1 <= count <= MAX_CLASSES):
        raise CheckpointError(f"`num_labels` of config.json is {count!r}, which makes no sense")
    if named is None:
        return tuple(f"LABEL_{number}" for number in range(2 if count is None else count))
    if count is not None and count != len(named):
        raise CheckpointError(f"`num_labels` is {count}, and `id2label` of config.json has {len(named)}")
    if named.keys() != {str(number) for number in range(len(named))}:
        raise CheckpointError(f"`id2label` of config.json numbers its {len(named)} classes otherwise than from 0 on")
    return tuple(named[str(number)] for number in range(len(named)))
