"""GPT-2: learned positions, LayerNorm before each sublayer, linear layers that keep [in, out]."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from megatron.checkpoint.layout import CheckpointError
from megatron.config.schema import ModelConfig
from megatron.interop.families.family import NUMBER, Field, HFClass, HFFamily
from megatron.interop.families.shared import (
    ACTIVATION_NAMES,
    activation,
    ffn_shape,
    hidden_shape,
    positions_shape,
    qkv_shape,
    unsupported_by_gpt2,
)
from megatron.interop.tensor_mapping import CONV1D, GAMMA, QKV_IN_ONE, SAME, Row

ROWS = (
    Row("embedding.word.weight", ("transformer.wte.weight",), SAME),
    Row("embedding.position.weight", ("transformer.wpe.weight",), SAME, zeros=positions_shape),
    Row("layers.{n}.input_norm.weight", ("transformer.h.{n}.ln_1.weight",), GAMMA),
    Row("layers.{n}.input_norm.bias", ("transformer.h.{n}.ln_1.bias",), SAME, zeros=hidden_shape),
    Row("layers.{n}.attention.qkv.weight", ("transformer.h.{n}.attn.c_attn.weight",), QKV_IN_ONE),
    Row("layers.{n}.attention.qkv.bias", ("transformer.h.{n}.attn.c_attn.bias",), QKV_IN_ONE, zeros=qkv_shape),
    Row("layers.{n}.attention.dense.weight", ("transformer.h.{n}.attn.c_proj.weight",), CONV1D),
    Row("layers.{n}.attention.dense.bias", ("transformer.h.{n}.attn.c_proj.bias",), SAME, zeros=hidden_shape),
    Row("layers.{n}.mlp_norm.weight", ("transformer.h.{n}.ln_2.weight",), GAMMA),
    Row("layers.{n}.mlp_norm.bias", ("transformer.h.{n}.ln_2.bias",), SAME, zeros=hidden_shape),
    Row("layers.{n}.mlp.up.weight", ("transformer.h.{n}.mlp.c_fc.weight",), CONV1D),
    Row("layers.{n}.mlp.up.bias", ("transformer.h.{n}.mlp.c_fc.bias",), SAME, zeros=ffn_shape),
    Row("layers.{n}.mlp.down.weight", ("transformer.h.{n}.mlp.c_proj.weight",), CONV1D),
    Row("layers.{n}.mlp.down.bias", ("transformer.h.{n}.mlp.c_proj.bias",), SAME, zeros=hidden_shape),
    Row("final_norm.weight", ("transformer.ln_f.weight",), GAMMA),
    Row("final_norm.bias", ("transformer.ln_f.bias",), SAME, zeros=hidden_shape),
    Row("head.weight", ("lm_head.weight",), SAME),
)
FIELDS: Mapping[str, Field] = MappingProxyType(
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


def _settings(values: Mapping[str, Any], about: Mapping[str, Any]) -> dict[str, Any]:
    if values["embd_pdrop"] != values["resid_pdrop"]:
        raise CheckpointError(
            f"`embd_pdrop` is {values['embd_pdrop']} and `resid_pdrop` {values['resid_pdrop']}; the model here has one dropout "
            "for both, which only training knows: write the one that you want into both"
        )
    return {
        "activation": activation(values["activation_function"], "activation_function"),
        "ffn_hidden_size": 4 * values["n_embd"] if values["n_inner"] is None else values["n_inner"],
    }


def _config(config: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.known_vocab_size,
        "n_positions": config.max_position_embeddings,
        "n_embd": config.hidden_size,
        "n_layer": config.num_layers,
        "n_head": config.num_attention_heads,
        "n_inner": config.ffn_hidden_size,
        "activation_function": ACTIVATION_NAMES[config.activation],
        "resid_pdrop": config.hidden_dropout,
        "embd_pdrop": config.hidden_dropout,
        "attn_pdrop": config.attention_dropout,
        "layer_norm_epsilon": config.layernorm_epsilon,
    }


GPT2 = HFFamily(
    model_type="gpt2",
    classes=(HFClass("GPT2LMHeadModel", ROWS),),
    fields=FIELDS,
    aliases=MappingProxyType(
        {
            "hidden_size": "n_embd",
            "max_position_embeddings": "n_positions",
            "num_attention_heads": "n_head",
            "num_hidden_layers": "n_layer",
        }
    ),
    settings=_settings,
    config=_config,
    unsupported=unsupported_by_gpt2,
    prefix="transformer.",
    copies=MappingProxyType({"lm_head.weight": "transformer.wte.weight"}),
)
