"""The rows of a family's table: which tensors of Hugging Face hold one of ours, and how the values are converted both ways."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron.config.schema import ModelConfig

Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class Conversion:
    """The layout of one native tensor in Hugging Face's files, as a function for each direction.

    Attributes:
        to_hf: converts the whole native tensor to those of the file, in the order of `TensorMapping.hf`.
        from_hf: the inverse of `to_hf`.
    """

    to_hf: Callable[[Tensor, ModelConfig], Tensors]
    from_hf: Callable[[Tensors, ModelConfig], Tensor]


@dataclass(frozen=True)
class TensorMapping:
    """A native tensor and the tensors of Hugging Face that hold it; `{n}` in the names stands for the layer's number.

    Attributes:
        native: the name of our tensor.
        hf: the names of the tensors in Hugging Face.
        conversion: converts the values.
        zeros_shape: returns the shape of our tensor, for tensors that the family always has: zeros of this shape are exported
            if our model lacks the tensor. None for tensors that models of the family may lack too.
    """

    native: str
    hf: tuple[str, ...]
    conversion: Conversion
    zeros_shape: Callable[[ModelConfig], tuple[int, ...]] | None = None

    def for_layer(self, n: int) -> TensorMapping:
        """Return the mapping with the number of a layer in its names."""
        return replace(self, native=self.native.format(n=n), hf=tuple(name.format(n=n) for name in self.hf))


def _keep(tensor: Tensor, config: ModelConfig) -> Tensors:
    return (tensor,)


def _keep_back(tensors: Tensors, config: ModelConfig) -> Tensor:
    return tensors[0]


def _transpose(tensor: Tensor, config: ModelConfig) -> Tensors:
    return (tensor.t(),)  # [out, in] -> [in, out]


def _transpose_back(tensors: Tensors, config: ModelConfig) -> Tensor:
    return tensors[0].t()  # [in, out] -> [out, in]


def _gamma(tensor: Tensor, config: ModelConfig) -> Tensors:
    """Convert a norm's weight to gamma: with apply_layernorm_1p our weight is gamma - 1."""
    return (tensor + 1 if config.apply_layernorm_1p else tensor,)


def _gamma_back(tensors: Tensors, config: ModelConfig) -> Tensor:
    return tensors[0] - 1 if config.apply_layernorm_1p else tensors[0]


def split_qkv(tensor: Tensor, config: ModelConfig) -> Tensors:
    """Split the native weight or bias of queries, keys and values.

    Args:
        tensor: `[groups * (heads_per_group + 2) * head_dim, ...]`: for each group its query heads, its key, its value.
        config: the resolved configuration.

    Returns:
        Queries `[heads * head_dim, ...]`, keys and values `[groups * head_dim, ...]`.
    """
    groups, head_dim = config.num_query_groups, config.kv_channels
    per_group = config.num_attention_heads // groups
    rows = tensor.reshape(groups, per_group + 2, head_dim, *tensor.shape[1:])  # [groups, heads_per_group + 2, head_dim, ...]
    return rows[:, :per_group].flatten(0, 2), rows[:, per_group].flatten(0, 1), rows[:, per_group + 1].flatten(0, 1)


def join_qkv(tensors: Tensors, config: ModelConfig) -> Tensor:
    """Join queries, keys and values into the native weight or bias; the inverse of `split_qkv`."""
    groups, head_dim = config.num_query_groups, config.kv_channels
    # Queries [groups, heads_per_group, head_dim, ...], keys and values [groups, 1, head_dim, ...].
    parts = [t.reshape(groups, -1, head_dim, *t.shape[1:]) for t in tensors]
    return torch.cat(parts, dim=1).flatten(0, 2)


def _stack_qkv(tensor: Tensor, config: ModelConfig) -> Tensors:
    """Join all queries, all keys and all values in one tensor; a matrix is [in, out], as in GPT-2's Conv1D."""
    stacked = torch.cat(split_qkv(tensor, config))  # [(heads + 2 * groups) * head_dim, ...]
    return (stacked.t() if stacked.dim() == 2 else stacked,)


def _unstack_qkv(tensors: Tensors, config: ModelConfig) -> Tensor:
    stacked = tensors[0].t() if tensors[0].dim() == 2 else tensors[0]  # [(heads + 2 * groups) * head_dim, ...]
    head_dim = config.kv_channels
    q, k = config.num_attention_heads * head_dim, config.num_query_groups * head_dim
    return join_qkv((stacked[:q], stacked[q : q + k], stacked[q + k :]), config)


SAME = Conversion(_keep, _keep_back)
CONV1D = Conversion(_transpose, _transpose_back)  # for transformers.pytorch_utils.Conv1D, whose weight is [in, out]
GAMMA = Conversion(_gamma, _gamma_back)
QKV_IN_ONE = Conversion(_stack_qkv, _unstack_qkv)
QKV_IN_THREE = Conversion(split_qkv, join_qkv)
