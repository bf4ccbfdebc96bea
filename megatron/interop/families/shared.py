"""Parts that several families share: shapes of their tensors, activations, rotary positions, what none of them expresses."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from megatron.checkpoint.layout import CheckpointError
from megatron.config.schema import ModelConfig
from megatron.interop.families.family import NUMBER

# The name of an activation in transformers.activations.ACT2FN -> ours; relu2 is the square of ReLU.
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
# The other way, for an MLP without a gate.
ACTIVATION_NAMES = MappingProxyType({"gelu": "gelu_new", "gelu-exact": "gelu", "squared-relu": "relu2"})


def hidden_shape(config: ModelConfig) -> tuple[int, ...]:
    """Return the shape of a bias or a norm as wide as the residual stream."""
    return (config.hidden_size,)


def ffn_shape(config: ModelConfig) -> tuple[int, ...]:
    """Return the shape of the bias inside the MLP."""
    return (config.ffn_hidden_size,)


def qkv_shape(config: ModelConfig) -> tuple[int, ...]:
    """Return the shape of the bias of queries, keys and values together."""
    return ((config.num_attention_heads + 2 * config.num_query_groups) * config.kv_channels,)


def positions_shape(config: ModelConfig) -> tuple[int, ...]:
    """Return the shape of the table of learned positions."""
    return (config.max_position_embeddings, config.hidden_size)


def unsupported_by_all(config: ModelConfig) -> list[str]:
    """Return what of a configuration no family expresses, in words."""
    if config.apply_residual_connection_post_layernorm:
        return ["the residual is taken from the norm's output (--apply-residual-connection-post-layernorm)"]
    return []


def unsupported_by_gpt2(config: ModelConfig) -> list[str]:
    """Return what the form of GPT-2 cannot express, which MegatronBert has too: LayerNorm, learned positions, no gate."""
    heads, hidden = config.num_attention_heads, config.hidden_size
    found = unsupported_by_all(config)
    if config.normalization != "LayerNorm":
        found.append(f"--normalization {config.normalization}: it has LayerNorm")
    if config.position_embedding_type == "rope":
        found.append("--position-embedding-type rope: it has learned positions")
    if config.activation not in ACTIVATION_NAMES:
        found.append(f"--{config.activation}: its MLP has no gate")
    if config.num_query_groups != heads:
        found.append(f"--num-query-groups {config.num_query_groups}: it has one key-value head per query head")
    if config.kv_channels * heads != hidden:
        found.append(f"--kv-channels {config.kv_channels}: its heads are hidden / heads = {hidden / heads:g} wide")
    return found


def activation_from_hf(name: str, field: str) -> str:
    """Return our name of an activation of transformers.

    Args:
        name: of the activation in transformers.
        field: of config.json in which it stands.

    Raises:
        CheckpointError: where the model here has none such.
    """
    if name not in ACTIVATIONS:
        raise CheckpointError(f"`{field}` is {name!r}; the model here has {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def rotary_base_from_hf(hf_config: Mapping[str, Any]) -> float:
    """Return the base of unscaled rotary positions, as Transformers 5 reads it.

    It can stand in `rope_scaling`, which goes before `rope_parameters` where it is not empty, and in `rope_theta`, the only one
    that Transformers 4 reads. CheckpointError where one of them says another base, and for positions that are scaled.
    """
    bases = {"rope_theta": hf_config["rope_theta"]} if "rope_theta" in hf_config else {}
    shares = [hf_config.get("partial_rotary_factor")]
    for name in ("rope_parameters", "rope_scaling"):
        table = hf_config.get(name)
        if table is None:
            continue
        if not isinstance(table, dict):
            raise CheckpointError(f"`{name}` of config.json is {table!r}, which makes no sense")
        _refuse_scaled(name, table)
        shares.append(table.get("partial_rotary_factor"))
        if "rope_theta" in table:
            bases[f"{name}.rope_theta"] = table["rope_theta"]
    if strange := [share for share in shares if share not in (None, 1)]:
        raise CheckpointError(f"`partial_rotary_factor` is {strange[0]!r}; of this family the model here turns whole heads")
    for name, value in bases.items():
        if not isinstance(value, NUMBER) or isinstance(value, bool) or not 0 < value < 1e30:
            raise CheckpointError(f"`{name}` of config.json is {value!r}, which makes no sense")
    table = hf_config.get("rope_scaling") or hf_config.get("rope_parameters") or {}
    base = float(table.get("rope_theta", bases.get("rope_theta", 10000.0)))
    if any(value != base for value in bases.values()):
        listed = " and ".join(f"`{name}` is {value}" for name, value in bases.items())
        raise CheckpointError(
            f"{listed}: Transformers 5 takes {base:g}, and other versions may not; leave only the right one in config.json"
        )
    return base


def _refuse_scaled(name: str, table: Mapping[str, Any]) -> None:
    """CheckpointError for rotary positions that are scaled. name: of the field of config.json that holds `table`."""
    for key, value in table.items():
        if key in ("rope_theta", "partial_rotary_factor") or value is None:
            continue
        if key in ("rope_type", "type") and value != "default":
            raise CheckpointError(f"`{name}` asks for {value!r}; the model here has unscaled rotary positions")
        if key not in ("rope_type", "type") and value != 1:  # a factor of 1 scales nothing
            raise CheckpointError(f"`{name}` says {key} = {value!r}; the model here has unscaled rotary positions")
