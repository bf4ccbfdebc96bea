"""GPT-2: learned positions, LayerNorm before each sublayer, weights of linear layers stored as [in, out]."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from megatron.checkpoint.layout import CheckpointError
from megatron.config.schema import ModelConfig
from megatron.interop.families.family import NUMBER, ConfigField, HFClass, HFFamily
from megatron.interop.families.shared import (
    ACTIVATION_NAMES,
    activation_from_hf,
    ffn_shape,
    hidden_shape,
    positions_shape,
    qkv_shape,
    unsupported_by_gpt2,
)
from megatron.interop.tensor_mapping import CONV1D, GAMMA, QKV_IN_ONE, SAME, TensorMapping

# The names of transformers.GPT2LMHeadModel. Its linear layers are Conv1D, so their weights are [in, out]; c_attn, which joins
# queries, keys and values, is [hidden, 3 * hidden].
TEMPLATES = (
    TensorMapping("embedding.word.weight", ("transformer.wte.weight",), SAME),  # [vocab, hidden]
    TensorMapping("embedding.position.weight", ("transformer.wpe.weight",), SAME, zeros_shape=positions_shape),
    TensorMapping("layers.{n}.input_norm.weight", ("transformer.h.{n}.ln_1.weight",), GAMMA),
    TensorMapping("layers.{n}.input_norm.bias", ("transformer.h.{n}.ln_1.bias",), SAME, zeros_shape=hidden_shape),
    TensorMapping("layers.{n}.attention.qkv.weight", ("transformer.h.{n}.attn.c_attn.weight",), QKV_IN_ONE),
    TensorMapping("layers.{n}.attention.qkv.bias", ("transformer.h.{n}.attn.c_attn.bias",), QKV_IN_ONE, zeros_shape=qkv_shape),
    TensorMapping("layers.{n}.attention.dense.weight", ("transformer.h.{n}.attn.c_proj.weight",), CONV1D),  # [hidden, hidden]
    TensorMapping("layers.{n}.attention.dense.bias", ("transformer.h.{n}.attn.c_proj.bias",), SAME, zeros_shape=hidden_shape),
    TensorMapping("layers.{n}.mlp_norm.weight", ("transformer.h.{n}.ln_2.weight",), GAMMA),
    TensorMapping("layers.{n}.mlp_norm.bias", ("transformer.h.{n}.ln_2.bias",), SAME, zeros_shape=hidden_shape),
    TensorMapping("layers.{n}.mlp.up.weight", ("transformer.h.{n}.mlp.c_fc.weight",), CONV1D),  # [hidden, ffn]
    TensorMapping("layers.{n}.mlp.up.bias", ("transformer.h.{n}.mlp.c_fc.bias",), SAME, zeros_shape=ffn_shape),
    TensorMapping("layers.{n}.mlp.down.weight", ("transformer.h.{n}.mlp.c_proj.weight",), CONV1D),  # [ffn, hidden]
    TensorMapping("layers.{n}.mlp.down.bias", ("transformer.h.{n}.mlp.c_proj.bias",), SAME, zeros_shape=hidden_shape),
    TensorMapping("final_norm.weight", ("transformer.ln_f.weight",), GAMMA),
    TensorMapping("final_norm.bias", ("transformer.ln_f.bias",), SAME, zeros_shape=hidden_shape),
    TensorMapping("head.weight", ("lm_head.weight",), SAME),  # [vocab, hidden]
)
# The defaults are those of transformers.GPT2Config.
FIELDS: Mapping[str, ConfigField] = MappingProxyType(
    {
        "vocab_size": ConfigField(int, 50257, "vocab_size"),
        "n_positions": ConfigField(int, 1024, "max_position_embeddings"),
        "n_embd": ConfigField(int, 768, "hidden_size"),
        "n_layer": ConfigField(int, 12, "num_layers"),
        "n_head": ConfigField(int, 12, "num_attention_heads"),
        "n_inner": ConfigField(int, None, "ffn_hidden_size"),  # null is 4 * n_embd
        "activation_function": ConfigField(str, "gelu_new"),
        "resid_pdrop": ConfigField(NUMBER, 0.1, "hidden_dropout"),
        "embd_pdrop": ConfigField(NUMBER, 0.1),  # dropout of the embeddings, for which we use hidden_dropout
        "attn_pdrop": ConfigField(NUMBER, 0.1, "attention_dropout"),
        "layer_norm_epsilon": ConfigField(float, 1e-5, "layernorm_epsilon"),
        "initializer_range": ConfigField(float, 0.02, "init_method_std"),
        "scale_attn_weights": ConfigField(bool, True, fixed=True),
        "scale_attn_by_inverse_layer_idx": ConfigField(bool, False, fixed=True),
        "add_cross_attention": ConfigField(bool, False, fixed=True),
        "tie_word_embeddings": ConfigField(bool, True),
    }
)


def _to_settings(values: Mapping[str, Any], hf_config: Mapping[str, Any]) -> dict[str, Any]:
    if values["embd_pdrop"] != values["resid_pdrop"]:
        raise CheckpointError(
            f"`embd_pdrop` is {values['embd_pdrop']} and `resid_pdrop` {values['resid_pdrop']}; the model here has one dropout "
            "for both, used only in training: write the rate that you want into both"
        )
    return {
        "activation": activation_from_hf(values["activation_function"], "activation_function"),
        "ffn_hidden_size": 4 * values["n_embd"] if values["n_inner"] is None else values["n_inner"],
    }


def _to_fields(config: ModelConfig) -> dict[str, Any]:
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
    classes=(HFClass("GPT2LMHeadModel", TEMPLATES),),
    fields=FIELDS,
    aliases=MappingProxyType(
        {
            "hidden_size": "n_embd",
            "max_position_embeddings": "n_positions",
            "num_attention_heads": "n_head",
            "num_hidden_layers": "n_layer",
        }
    ),
    to_settings=_to_settings,
    to_fields=_to_fields,
    unsupported=unsupported_by_gpt2,
    tensor_prefix="transformer.",
    tied_copies=MappingProxyType({"lm_head.weight": "transformer.wte.weight"}),
)
