"""Parts that several families share: shapes of tensors, activations, rotary positions, unsupported settings."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from megatron.checkpoint.layout import CheckpointError
from megatron.config.schema import ModelConfig
from megatron.interop.families.family import NUMBER

# The name of an activation in transformers.activations.ACT2FN -> our name.
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
# Our name of an activation -> the name that is exported. Only for MLPs without a gate.
ACTIVATION_NAMES = MappingProxyType({"gelu": "gelu_new", "gelu-exact": "gelu", "squared-relu": "relu2"})


def hidden_shape(config: ModelConfig) -> tuple[int, ...]:
    """Return the shape of a bias or norm weight of the hidden size."""
    return (config.hidden_size,)


def ffn_shape(config: ModelConfig) -> tuple[int, ...]:
    """Return the shape of the bias of the MLP's first linear layer."""
    return (config.ffn_hidden_size,)


def qkv_shape(config: ModelConfig) -> tuple[int, ...]:
    """Return the shape of the bias of queries, keys and values together."""
    return ((config.num_attention_heads + 2 * config.num_query_groups) * config.kv_channels,)


def positions_shape(config: ModelConfig) -> tuple[int, ...]:
    """Return the shape of the embedding of learned positions."""
    return (config.max_position_embeddings, config.hidden_size)


def unsupported_by_all(config: ModelConfig) -> list[str]:
    """Return as texts the settings of a configuration that no family can express."""
    if config.apply_residual_connection_post_layernorm:
        return ["the residual is taken from the norm's output (--apply-residual-connection-post-layernorm)"]
    return []


def unsupported_by_gpt2(config: ModelConfig) -> list[str]:
    """Return as texts the settings that GPT-2 and MegatronBert cannot express.

    Both have LayerNorm, learned positions, an MLP without a gate, and heads of the width hidden / heads.
    """
    heads, hidden = config.num_attention_heads, config.hidden_size
    obstacles = unsupported_by_all(config)
    if config.normalization != "LayerNorm":
        obstacles.append(f"--normalization {config.normalization}: it has LayerNorm")
    if config.position_embedding_type == "rope":
        obstacles.append("--position-embedding-type rope: it has learned positions")
    if config.activation not in ACTIVATION_NAMES:
        obstacles.append(f"--{config.activation}: its MLP has no gate")
    if config.num_query_groups != heads:
        obstacles.append(f"--num-query-groups {config.num_query_groups}: it has one key-value head per query head")
    if config.kv_channels * heads != hidden:
        obstacles.append(f"--kv-channels {config.kv_channels}: its heads are hidden / heads = {hidden / heads:g} wide")
    return obstacles


def activation_from_hf(name: str, field: str) -> str:
    """Return our name of an activation of transformers.

    Args:
        name: its name in transformers.
        field: the field of config.json that contains it, for the message.

    Raises:
        CheckpointError: the model here does not have this activation.
    """
    if name not in ACTIVATIONS:
        raise CheckpointError(f"`{field}` is {name!r}; the model here has {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def rotary_base_from_hf(hf_config: Mapping[str, Any]) -> float:
    """Return the base of unscaled rotary positions, as Transformers 5 reads it.

    It is in `rope_scaling`, if that is not empty, or in `rope_parameters`, or in the field `rope_theta`, which is the only one
    that Transformers 4 reads. CheckpointError if they contradict each other, and for scaled positions.
    """
    bases = {"rope_theta": hf_config["rope_theta"]} if "rope_theta" in hf_config else {}
    rotary_factors = [hf_config.get("partial_rotary_factor")]
    for name in ("rope_parameters", "rope_scaling"):
        table = hf_config.get(name)
        if table is None:
            continue
        if not isinstance(table, dict):
            raise CheckpointError(f"`{name}` of config.json is {table!r}, which makes no sense")
        _refuse_scaled(name, table)
        rotary_factors.append(table.get("partial_rotary_factor"))
        if "rope_theta" in table:
            bases[f"{name}.rope_theta"] = table["rope_theta"]
    if partial := [factor for factor in rotary_factors if factor not in (None, 1)]:
        raise CheckpointError(f"`partial_rotary_factor` is {partial[0]!r}; in this family the model here rotates whole heads")
    for name, value in bases.items():
        if not isinstance(value, NUMBER) or isinstance(value, bool) or not 0 < value < 1e30:
            raise CheckpointError(f"`{name}` of config.json is {value!r}, which makes no sense")
    table = hf_config.get("rope_scaling") or hf_config.get("rope_parameters") or {}
    base = float(table.get("rope_theta", bases.get("rope_theta", 10000.0)))
    if any(value != base for value in bases.values()):
        listed = " and ".join(f"`{name}` is {value}" for name, value in bases.items())
        raise CheckpointError(
            f"{listed}: Transformers 5 uses {base:g}, and other versions may not; leave only the right one in config.json"
        )
    return base


def _refuse_scaled(name: str, table: Mapping[str, Any]) -> None:
    """Raise CheckpointError for scaled rotary positions. name: the field of config.json that contains `table`."""
    for key, value in table.items():
        if key in ("rope_theta", "partial_rotary_factor") or value is None:
            continue
        if key in ("rope_type", "type") and value != "default":
            raise CheckpointError(f"`{name}` asks for {value!r}; the model here has unscaled rotary positions")
        if key not in ("rope_type", "type") and value != 1:  # a factor of 1 scales nothing
            raise CheckpointError(f"`{name}` says {key} = {value!r}; the model here has unscaled rotary positions")
