"""Convert config.json of a Hugging Face directory to our configuration, as the family's class in transformers reads it.

Each field of the class is either converted or accepted with a single value. Fields that the class does not know are ignored, as
transformers does, except for a few that code shared by all of its classes reads.
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
MAX_SIZE = 2**31 - 1  # of any integer in config.json
# Fields that code shared by all classes of transformers 4 or 5 reads, each with a test for values without any effect.
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
    """Return the resolved configuration that config.json describes, as a model of the family's first class.

    Raises:
        CheckpointError: a field is invalid, or asks for something that the model here does not have; the message names it.
    """
    values = _field_values(hf_config, family)
    copied = {field.native: values[name] for name, field in family.fields.items() if field.native is not None}
    model = ModelSettings(
        **{**copied, **family.to_settings(values, hf_config)},
        untie_embeddings_and_output_weights=not values["tie_word_embeddings"],  # the inverse of transformers' switch
    )
    try:
        return resolve_model(model)
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def _refuse_shared_fields(hf_config: Mapping[str, Any], family: HFFamily) -> None:
    """Raise CheckpointError for a field in SHARED_FIELDS that has an effect and is not one of the family's own."""
    for name, has_no_effect in SHARED_FIELDS.items():
        if name in hf_config and name not in family.fields and not has_no_effect(hf_config[name]):
            raise CheckpointError(f"`{name}` is {str(hf_config[name])[:80]}; the model here has no such thing")
    # transformers reads null as false: not causal.
    if "is_causal" in hf_config and bool(hf_config["is_causal"]) is not family.causal:
        raise CheckpointError(f"`is_causal` is {hf_config['is_causal']!r}; the model here has {family.causal!r} only")


def _field_values(hf_config: Mapping[str, Any], family: HFFamily) -> dict[str, Any]:
    """Return the value of every field of the family, the default of an absent one."""
    _refuse_shared_fields(hf_config, family)
    given = dict(hf_config)
    for alias, name in family.aliases.items():
        if alias in hf_config and (other := given.setdefault(name, hf_config[alias])) != hf_config[alias]:
            raise CheckpointError(f"`{alias}` is {hf_config[alias]!r} and `{name}` {other!r}, which are two names of one field")
    values = {}
    for name, field in family.fields.items():
        values[name] = value = given.get(name, field.default)
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
    """Return the name of the class that a directory was saved from; None if config.json does not contain it."""
    architectures = hf_config.get("architectures")
    if architectures is None or architectures == []:
        return None
    if not isinstance(architectures, list) or any(not isinstance(name, str) for name in architectures):
        raise CheckpointError(f"`architectures` of config.json is {architectures!r}; it must be a list of names")
    return str(architectures[0])


def saved_dtype(hf_config: Mapping[str, Any]) -> str | None:
    """Return the dtype to which transformers converts the weights when it opens a directory; None if it does not convert."""
    # Newer versions write `dtype`, older ones `torch_dtype`; transformers reads both, the newer name first.
    name = hf_config.get("dtype") if hf_config.get("dtype") is not None else hf_config.get("torch_dtype")
    if name is not None and name not in HF_DTYPES:
        raise CheckpointError(f"`dtype` of config.json is {name!r}; known are {', '.join(HF_DTYPES)}")
    return name
