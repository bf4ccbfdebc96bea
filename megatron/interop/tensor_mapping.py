"""How one tensor of ours is written as tensors of another framework, and read back; the lines of which its table is made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron.config.schema import ModelConfig

Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class Form:
    """How one tensor of ours is written as theirs, and read back."""

    write: Callable[[Tensor, ModelConfig], Tensors]
    read: Callable[[Tensors, ModelConfig], Tensor]


@dataclass(frozen=True)
class Row:
    """One line of a table; `{n}` stands for the layer's number.

    zeros: the shape of ours, where the family has the tensor in any case and zeros mean that it is not there. Without it
    the row applies only to models that have the tensor.
    """

    ours: str
    theirs: tuple[str, ...]
    form: Form
    zeros: Callable[[ModelConfig], tuple[int, ...]] | None = None

    def at(self, n: int) -> Row:
        """Return the row with the number of a layer in its names."""
        return replace(self, ours=self.ours.format(n=n), theirs=tuple(t.format(n=n) for t in self.theirs))


def _as_it_is(tensor: Tensor, config: ModelConfig) -> Tensors:
    return (tensor,)


def _back_as_it_is(tensors: Tensors, config: ModelConfig) -> Tensor:
    return tensors[0]


def _turned(tensor: Tensor, config: ModelConfig) -> Tensors:
    return (tensor.t(),)


def _turned_back(tensors: Tensors, config: ModelConfig) -> Tensor:
    return tensors[0].t()


def _gamma(tensor: Tensor, config: ModelConfig) -> Tensors:
    """The norm's true weight: with apply_layernorm_1p what is stored is gamma - 1."""
    return (tensor + 1 if config.apply_layernorm_1p else tensor,)


def _gamma_back(tensors: Tensors, config: ModelConfig) -> Tensor:
    return tensors[0] - 1 if config.apply_layernorm_1p else tensors[0]


def split_qkv(tensor: Tensor, config: ModelConfig) -> Tensors:
    """Rows `[groups, heads per group + 2, head]` -> queries of all heads, keys of all groups, values of all groups."""
    groups, head = config.num_query_groups, config.kv_channels
    per_group = config.num_attention_heads // groups
    rows = tensor.reshape(groups, per_group + 2, head, *tensor.shape[1:])
    return rows[:, :per_group].flatten(0, 2), rows[:, per_group].flatten(0, 1), rows[:, per_group + 1].flatten(0, 1)


def join_qkv(tensors: Tensors, config: ModelConfig) -> Tensor:
    """The inverse of `split_qkv`."""
    groups, head = config.num_query_groups, config.kv_channels
    parts = [t.reshape(groups, -1, head, *t.shape[1:]) for t in tensors]
    return torch.cat(parts, dim=1).flatten(0, 2)


def _qkv_in_one(tensor: Tensor, config: ModelConfig) -> Tensors:
    """All queries, all keys, all values in one; a matrix as GPT-2's Conv1D has it, input first."""
    whole = torch.cat(split_qkv(tensor, config))
    return (whole.t() if whole.dim() == 2 else whole,)


def _qkv_from_one(tensors: Tensors, config: ModelConfig) -> Tensor:
    whole = tensors[0].t() if tensors[0].dim() == 2 else tensors[0]
    head = config.kv_channels
    q, k = config.num_attention_heads * head, config.num_query_groups * head
    return join_qkv((whole[:q], whole[q : q + k], whole[q + k :]), config)


SAME = Form(_as_it_is, _back_as_it_is)
CONV1D = Form(_turned, _turned_back)  # GPT-2's linear layers keep [in, out]
GAMMA = Form(_gamma, _gamma_back)
QKV_IN_ONE = Form(_qkv_in_one, _qkv_from_one)
QKV_IN_THREE = Form(split_qkv, join_qkv)
