"""Read config.json of a Hugging Face directory as our configuration, as the family's class in transformers reads it.

A field is read, or has one value here and every other is refused. What the class does not know it ignores, and so do we, but
for a few fields that code shared by all classes looks for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import isfinite
from types import MappingProxyType
from typing import Any

from megatron.checkpoint.layout import CheckpointError
from megatron.config.resolve import resolve_model
from megatron.config.schema import ModelConfig, ModelSettings
from megatron.interop.families.family import HFFamily

HF_DTYPES = ("float64", "float32", "float16", "bfloat16")
MAX_SIZE = 2**31 - 1  # of any whole number of config.json
# Fields that no class need know, since code that all share looks for them, in transformers 4 or 5; each with a test of the
# values that mean nothing.
SHARED_FIELDS: Mapping[str, Callable[[Any], bool]] = MappingProxyType(
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


def config_from_hf(hf_config: Mapping[str, Any], family: HFFamily) -> ModelConfig:
    """Return the resolved configuration that config.json describes, tied as it says, of the family's first class.

    Raises:
        CheckpointError: naming the field that makes no sense, or asks for what the model here does not have.
    """
    values = _field_values(hf_config, family)
    same = {field.native: values[name] for name, field in family.fields.items() if field.native is not None}
    model = ModelSettings(
        **{**same, **family.to_settings(values, hf_config)},
        untie_embeddings_and_output_weights=not values["tie_word_embeddings"],  # transformers' switch says the opposite
    )
    try:
        return resolve_model(model)
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def _refuse_foreign(hf_config: Mapping[str, Any], family: HFFamily) -> None:
    """Raise CheckpointError for a field that code shared by all classes looks for, and that is none of the family's own."""
    for name, harmless in SHARED_FIELDS.items():
        if name in hf_config and name not in family.fields and not harmless(hf_config[name]):
            raise CheckpointError(f"`{name}` is {str(hf_config[name])[:80]}; the model here has no such thing")
    # To transformers null is false here: not causal.
    if "is_causal" in hf_config and bool(hf_config["is_causal"]) is not family.causal:
        raise CheckpointError(f"`is_causal` is {hf_config['is_causal']!r}; the model here has {family.causal!r} only")


def _field_values(hf_config: Mapping[str, Any], family: HFFamily) -> dict[str, Any]:
    """Return the value of every field of the family's class, its default where it is absent."""
    _refuse_foreign(hf_config, family)
    named = dict(hf_config)
    for alias, name in family.aliases.items():
        if alias in hf_config and (other := named.setdefault(name, hf_config[alias])) != hf_config[alias]:
            raise CheckpointError(f"`{alias}` is {hf_config[alias]!r} and `{name}` {other!r}, which are one and the same")
    values = {}
    for name, field in family.fields.items():
        values[name] = value = named.get(name, field.default)
        if value is None and field.default is None:
            continue
        kinds_differ = isinstance(value, bool) != (field.types is bool)  # a bool is an int to Python
        if not isinstance(value, field.types) or kinds_differ or (isinstance(value, float) and not isfinite(value)):
            raise CheckpointError(f"`{name}` of config.json is {value!r}, which makes no sense")
        if field.fixed and value != field.default:
            raise CheckpointError(f"`{name}` is {value!r}; the model here has {field.default!r} only")
        if type(value) is int and not isinstance(field.default, float) and not 1 <= value <= MAX_SIZE:
            raise CheckpointError(f"`{name}` of config.json is {value!r}; it must be a number from 1 to {MAX_SIZE}")
    return values


def saved_class(hf_config: Mapping[str, Any]) -> str | None:
    """Return the name of the class that a directory was saved from; None where it does not say."""
    named = hf_config.get("architectures")
    if named is None or named == []:
        return None
    if not isinstance(named, list) or any(not isinstance(name, str) for name in named):
        raise CheckpointError(f"`architectures` of config.json is {named!r}; it must be a list of names")
    return str(named[0])


def saved_dtype(hf_config: Mapping[str, Any]) -> str | None:
    """Return the type that transformers gives the weights as it opens a directory; None where it takes that of the tensors."""
    # Newer versions write `dtype`, older ones `torch_dtype`; transformers reads both, the newer name first.
    name = hf_config.get("dtype") if hf_config.get("dtype") is not None else hf_config.get("torch_dtype")
    if name is not None and name not in HF_DTYPES:
        raise CheckpointError(f"`dtype` of config.json is {name!r}; known are {', '.join(HF_DTYPES)}")
    return name
