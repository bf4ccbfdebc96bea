"""Llama: rotary positions, RMSNorm, a gated MLP, grouped-query attention."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from megatron.checkpoint.layout import CheckpointError
from megatron.config.schema import ModelConfig
from megatron.interop.families.family import NUMBER, ConfigField, HFClass, HFFamily
from megatron.interop.families.shared import rotary_base_from_hf, unsupported_by_all
from megatron.interop.tensor_mapping import GAMMA, QKV_IN_THREE, SAME, TensorMapping


def _projections(kind: str) -> tuple[str, ...]:
    """Return the names of the query, key and value tensors. kind: `weight` or `bias`."""
    return tuple(f"model.layers.{{n}}.self_attn.{x}_proj.{kind}" for x in "qkv")


# The names of transformers.LlamaForCausalLM. Weights of linear layers are [out, in]: queries [heads * head_dim, hidden], keys
# and values [groups * head_dim, hidden], the output [hidden, heads * head_dim].
TEMPLATES = (
    TensorMapping("embedding.word.weight", ("model.embed_tokens.weight",), SAME),  # [vocab, hidden]
    TensorMapping("layers.{n}.input_norm.weight", ("model.layers.{n}.input_layernorm.weight",), GAMMA),
    TensorMapping("layers.{n}.attention.qkv.weight", _projections("weight"), QKV_IN_THREE),
    TensorMapping("layers.{n}.attention.qkv.bias", _projections("bias"), QKV_IN_THREE),
    TensorMapping("layers.{n}.attention.dense.weight", ("model.layers.{n}.self_attn.o_proj.weight",), SAME),
    TensorMapping("layers.{n}.attention.dense.bias", ("model.layers.{n}.self_attn.o_proj.bias",), SAME),
    TensorMapping("layers.{n}.mlp_norm.weight", ("model.layers.{n}.post_attention_layernorm.weight",), GAMMA),
    TensorMapping("layers.{n}.mlp.gate.weight", ("model.layers.{n}.mlp.gate_proj.weight",), SAME),  # [ffn, hidden]
    TensorMapping("layers.{n}.mlp.gate.bias", ("model.layers.{n}.mlp.gate_proj.bias",), SAME),
    TensorMapping("layers.{n}.mlp.up.weight", ("model.layers.{n}.mlp.up_proj.weight",), SAME),  # [ffn, hidden]
    TensorMapping("layers.{n}.mlp.up.bias", ("model.layers.{n}.mlp.up_proj.bias",), SAME),
    TensorMapping("layers.{n}.mlp.down.weight", ("model.layers.{n}.mlp.down_proj.weight",), SAME),  # [hidden, ffn]
    TensorMapping("layers.{n}.mlp.down.bias", ("model.layers.{n}.mlp.down_proj.bias",), SAME),
    TensorMapping("final_norm.weight", ("model.norm.weight",), GAMMA),
    TensorMapping("head.weight", ("lm_head.weight",), SAME),  # [vocab, hidden]
)
# The fields that Llama and Mistral share, with the defaults of transformers.LlamaConfig.
FIELDS_LIKE_LLAMA: Mapping[str, ConfigField] = MappingProxyType(
    {
        "vocab_size": ConfigField(int, 32000, "vocab_size"),
        "hidden_size": ConfigField(int, 4096, "hidden_size"),
        "num_hidden_layers": ConfigField(int, 32, "num_layers"),
        "num_attention_heads": ConfigField(int, 32, "num_attention_heads"),
        "head_dim": ConfigField(int, None, "kv_channels"),  # null is hidden_size / num_attention_heads
        "hidden_act": ConfigField(str, "silu"),
        "initializer_range": ConfigField(float, 0.02, "init_method_std"),
        "rms_norm_eps": ConfigField(float, 1e-6, "layernorm_epsilon"),
        "tie_word_embeddings": ConfigField(bool, False),
        "rope_parameters": ConfigField(dict, None),
        "attention_dropout": ConfigField(NUMBER, 0.0, "attention_dropout"),
    }
)
FIELDS: Mapping[str, ConfigField] = MappingProxyType(
    {
        **FIELDS_LIKE_LLAMA,
        "intermediate_size": ConfigField(int, 11008, "ffn_hidden_size"),
        "num_key_value_heads": ConfigField(int, None, "num_query_groups"),  # null is one for each head
        "max_position_embeddings": ConfigField(int, 2048, "max_position_embeddings"),
        "attention_bias": ConfigField(bool, False),
        "mlp_bias": ConfigField(bool, False),
    }
)


def settings_like_llama(values: Mapping[str, Any], hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of Llama and of families that differ from it only in their fields.

    Args:
        values: the value of each of the family's fields.
        hf_config: the content of config.json.

    Raises:
        CheckpointError: a value asks for something that the model here does not have.
    """
    if values["hidden_act"] not in ("silu", "swish"):
        raise CheckpointError(f"`hidden_act` is {values['hidden_act']!r}; the model here has 'silu' only")
    bias = values.get("attention_bias", False)
    if bias != values.get("mlp_bias", False):
        raise CheckpointError(
            "`attention_bias` and `mlp_bias` differ; the model here has biases in all linear layers or in none"
        )
    window = values.get("sliding_window")
    # A window of max_position_embeddings or more masks nothing.
    if window is not None and window < values["max_position_embeddings"]:
        default = "" if "sliding_window" in hf_config else " by default"
        raise CheckpointError(
            f"`sliding_window` is {window}{default}, less than the {values['max_position_embeddings']} positions; the model "
            "here has no sliding window"
        )
    return {
        "normalization": "RMSNorm",
        "position_embedding_type": "rope",
        "rotary_base": rotary_base_from_hf(hf_config),
        "activation": "swiglu",
        "add_bias_linear": bias,
        "hidden_dropout": 0.0,  # the family has none
    }


def _to_settings(values: Mapping[str, Any], hf_config: Mapping[str, Any]) -> dict[str, Any]:
    heads, width = values["num_attention_heads"], values["hidden_size"]
    if width % heads:  # LlamaConfig refuses it too, also where head_dim is given
        raise CheckpointError(f"{heads} attention heads do not divide the width {width}")
    if hf_config.get("sliding_window") is not None:
        raise CheckpointError(f"`sliding_window` is {hf_config['sliding_window']!r}; the model here has None only")
    return settings_like_llama(values, hf_config)


def _to_fields(config: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.known_vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_query_groups,
        "head_dim": config.kv_channels,
        "hidden_act": "silu",
        "rms_norm_eps": config.layernorm_epsilon,
        "attention_bias": config.add_bias_linear,
        "mlp_bias": config.add_bias_linear,
        "attention_dropout": config.attention_dropout,
        # Transformers 4 reads rope_theta, Transformers 5 rope_parameters.
        "rope_theta": config.rotary_base,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rotary_base},
    }


def _unsupported(config: ModelConfig) -> list[str]:
    heads, hidden = config.num_attention_heads, config.hidden_size
    obstacles = unsupported_by_all(config)
    if config.normalization != "RMSNorm":
        obstacles.append(f"--normalization {config.normalization}: it has RMSNorm")
    if config.position_embedding_type != "rope":
        obstacles.append(f"--position-embedding-type {config.position_embedding_type}: it has rope")
    elif config.rotary_percent != 1.0:
        obstacles.append(f"--rotary-percent {config.rotary_percent:g}: it rotates whole heads")
    elif config.rotary_interleaved:
        obstacles.append("--rotary-interleaved: it rotates the halves of a head")
    if config.activation != "swiglu":
        obstacles.append(f"the activation {config.activation}: it has --swiglu")
    if hidden % heads:
        obstacles.append(f"--hidden-size {hidden}: transformers wants a multiple of the {heads} heads")
    return obstacles


LLAMA = HFFamily(
    model_type="llama",
    classes=(HFClass("LlamaForCausalLM", TEMPLATES),),
    fields=FIELDS,
    to_settings=_to_settings,
    to_fields=_to_fields,
    unsupported=_unsupported,
    unwritten_settings=MappingProxyType({"hidden_dropout": "transformers' Llama has no hidden dropout"}),
    tensor_prefix="model.",
    tied_copies=MappingProxyType({"lm_head.weight": "model.embed_tokens.weight"}),
)
