"""config.json of a Hugging Face directory as our configuration, read as the family's class in transformers reads it.

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

DTYPES = ("float64", "float32", "float16", "bfloat16")
MAX_SIZE = 2**31 - 1
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


def model_settings(about: Mapping[str, Any], family: HFFamily) -> ModelConfig:
    """The resolved configuration that config.json describes, tied as it says, of the family's first class.

    CheckpointError naming the field that makes no sense, or asks for what the model here does not have.
    """
    values = _values(about, family)
    own = {field.ours: values[name] for name, field in family.fields.items() if field.ours is not None}
    model = ModelSettings(
        **{**own, **family.settings(values, about)},
        untie_embeddings_and_output_weights=not values["tie_word_embeddings"],
    )
    try:
        return resolve_model(model)
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def _refuse_foreign(about: Mapping[str, Any], family: HFFamily) -> None:
    """CheckpointError for a field that code shared by all classes looks for, and that is none of the family's own."""
    for name, harmless in SHARED.items():
        if name in about and name not in family.fields and not harmless(about[name]):
            raise CheckpointError(f"`{name}` is {str(about[name])[:80]}; the model here has no such thing")
    # null is false there: not causal
    if "is_causal" in about and bool(about["is_causal"]) is not family.causal:
        raise CheckpointError(f"`is_causal` is {about['is_causal']!r}; the model here has {family.causal!r} only")


def _values(about: Mapping[str, Any], family: HFFamily) -> dict[str, Any]:
    """The value of every field of the family's class."""
    _refuse_foreign(about, family)
    given = dict(about)
    for alias, name in family.aliases.items():
        if alias in about and given.setdefault(name, about[alias]) != about[alias]:
            raise CheckpointError(f"`{alias}` is {about[alias]!r} and `{name}` {about[name]!r}, which are one and the same")
    values = {}
    for name, field in family.fields.items():
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
