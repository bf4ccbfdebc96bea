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
from megatron.interop.families.family import NUMBER, Field, HFClass
from megatron.interop.families.llama import LLAMA
from megatron.interop.tensor_mapping import GAMMA, SAME, Form, Row, Tensors, join_qkv, split_qkv


def stack_qkv(tensor: Tensor, config: ModelConfig) -> Tensors:
    """Return the stacked queries, keys and values as the toy has them."""
    return (torch.cat(split_qkv(tensor, config)),)


def split_stacked_qkv(tensors: Tensors, config: ModelConfig) -> Tensor:
    """Return what the toy has stacked as our queries, keys and values."""
    heads, groups, width = config.num_attention_heads, config.num_query_groups, config.kv_channels
    return join_qkv(tensors[0].split([heads * width, groups * width, groups * width]), config)


ROWS = (
    Row("embedding.word.weight", ("toy.tokens.matrix",), SAME),
    Row("layers.{n}.input_norm.weight", ("toy.blocks.{n}.before_attention.scale",), GAMMA),
    Row("layers.{n}.attention.qkv.weight", ("toy.blocks.{n}.attention.stacked",), Form(stack_qkv, split_stacked_qkv)),
    Row("layers.{n}.attention.dense.weight", ("toy.blocks.{n}.attention.out",), SAME),
    Row("layers.{n}.mlp_norm.weight", ("toy.blocks.{n}.before_mlp.scale",), GAMMA),
    Row("layers.{n}.mlp.gate.weight", ("toy.blocks.{n}.mlp.opens",), SAME),
    Row("layers.{n}.mlp.up.weight", ("toy.blocks.{n}.mlp.wide",), SAME),
    Row("layers.{n}.mlp.down.weight", ("toy.blocks.{n}.mlp.narrow",), SAME),
    Row("final_norm.weight", ("toy.last.scale",), GAMMA),
    Row("head.weight", ("words.matrix",), SAME),
)
FIELDS = MappingProxyType(
    {
        "vocab_size": Field(int, 32000, "vocab_size"),
        "width": Field(int, 4096, "hidden_size"),
        "inner_width": Field(int, 11008, "ffn_hidden_size"),
        "depth": Field(int, 32, "num_layers"),
        "heads": Field(int, 32, "num_attention_heads"),
        "shared_heads": Field(int, None, "num_query_groups"),
        "head_width": Field(int, None, "kv_channels"),
        "longest": Field(int, 2048, "max_position_embeddings"),
        "epsilon": Field(float, 1e-6, "layernorm_epsilon"),
        "base": Field(NUMBER, 10000.0, "rotary_base"),
        "dropout": Field(NUMBER, 0.0, "attention_dropout"),
        "initializer_range": Field(float, 0.02, "init_method_std"),
        "tie_word_embeddings": Field(bool, False),
    }
)


def settings(values: Mapping[str, Any], about: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "normalization": "RMSNorm",
        "position_embedding_type": "rope",
        "activation": "swiglu",
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
    }


def config(model: ModelConfig) -> dict[str, Any]:
    return {
        name: getattr(model, field.ours)
        for name, field in FIELDS.items()
        if field.ours is not None and name != "initializer_range"
    }


def unsupported(model: ModelConfig) -> list[str]:
    return [*LLAMA.unsupported(model), *(["biases: it has none"] if model.add_bias_linear else [])]


TOY_LLAMA = replace(
    LLAMA,
    model_type="toy_llama",
    classes=(HFClass("ToyLlamaForCausalLM", ROWS),),
    fields=FIELDS,
    settings=settings,
    config=config,
    unsupported=unsupported,
    unwritten={"hidden_dropout": "a toy has no hidden dropout"},
    prefix="toy.",
    heads=("words.",),
    copies={"words.matrix": "toy.tokens.matrix"},
)
