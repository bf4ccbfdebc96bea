"""A family of Hugging Face that neither the package nor transformers has, as another package would bring it: one file.

It is a Llama with other names for everything: its tensors, with queries, keys and values stacked in one; and the fields of its
configuration, with the base of its rotary positions as a plain number.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from megatron.config.schema import ModelConfig
from megatron.interop.families.family import NUMBER, ConfigField, HFClass
from megatron.interop.families.llama import LLAMA
from megatron.interop.tensor_mapping import GAMMA, SAME, Conversion, TensorMapping, Tensors, join_qkv, split_qkv


def stack_qkv(tensor: Tensor, config: ModelConfig) -> Tensors:
    """Return the stacked queries, keys and values as the toy has them."""
    return (torch.cat(split_qkv(tensor, config)),)


def split_stacked_qkv(tensors: Tensors, config: ModelConfig) -> Tensor:
    """Return what the toy has stacked as our queries, keys and values."""
    heads, groups, width = config.num_attention_heads, config.num_query_groups, config.kv_channels
    return join_qkv(tensors[0].split([heads * width, groups * width, groups * width]), config)


ROWS = (
    TensorMapping("embedding.word.weight", ("toy.tokens.matrix",), SAME),
    TensorMapping("layers.{n}.input_norm.weight", ("toy.blocks.{n}.before_attention.scale",), GAMMA),
    TensorMapping(
        "layers.{n}.attention.qkv.weight", ("toy.blocks.{n}.attention.stacked",), Conversion(stack_qkv, split_stacked_qkv)
    ),
    TensorMapping("layers.{n}.attention.dense.weight", ("toy.blocks.{n}.attention.out",), SAME),
    TensorMapping("layers.{n}.mlp_norm.weight", ("toy.blocks.{n}.before_mlp.scale",), GAMMA),
    TensorMapping("layers.{n}.mlp.gate.weight", ("toy.blocks.{n}.mlp.opens",), SAME),
    TensorMapping("layers.{n}.mlp.up.weight", ("toy.blocks.{n}.mlp.wide",), SAME),
    TensorMapping("layers.{n}.mlp.down.weight", ("toy.blocks.{n}.mlp.narrow",), SAME),
    TensorMapping("final_norm.weight", ("toy.last.scale",), GAMMA),
    TensorMapping("head.weight", ("words.matrix",), SAME),
)
FIELDS = MappingProxyType(
    {
        "vocab_size": ConfigField(int, 32000, "vocab_size"),
        "width": ConfigField(int, 4096, "hidden_size"),
        "inner_width": ConfigField(int, 11008, "ffn_hidden_size"),
        "depth": ConfigField(int, 32, "num_layers"),
        "heads": ConfigField(int, 32, "num_attention_heads"),
        "shared_heads": ConfigField(int, None, "num_query_groups"),
        "head_width": ConfigField(int, None, "kv_channels"),
        "longest": ConfigField(int, 2048, "max_position_embeddings"),
        "epsilon": ConfigField(float, 1e-6, "layernorm_epsilon"),
        "base": ConfigField(NUMBER, 10000.0, "rotary_base"),
        "dropout": ConfigField(NUMBER, 0.0, "attention_dropout"),
        "initializer_range": ConfigField(float, 0.02, "init_method_std"),
        "tie_word_embeddings": ConfigField(bool, False),
    }
)


def to_settings(values: Mapping[str, Any], hf_config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "normalization": "RMSNorm",
        "position_embedding_type": "rope",
        "activation": "swiglu",
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
    }


def to_fields(model: ModelConfig) -> dict[str, Any]:
    return {
        name: getattr(model, field.native)
        for name, field in FIELDS.items()
        if field.native is not None and name != "initializer_range"
    }


def unsupported(model: ModelConfig) -> list[str]:
    return [*LLAMA.unsupported(model), *(["biases: it has none"] if model.add_bias_linear else [])]


TOY_LLAMA = replace(
    LLAMA,
    model_type="toy_llama",
    classes=(HFClass("ToyLlamaForCausalLM", ROWS),),
    fields=FIELDS,
    to_settings=to_settings,
    to_fields=to_fields,
    unsupported=unsupported,
    unwritten_settings={"hidden_dropout": "a toy has no hidden dropout"},
    tensor_prefix="toy.",
    head_prefixes=("words.",),
    tied_copies={"words.matrix": "toy.tokens.matrix"},
)
