"""Self-attention: queries, keys and values in one projection, the core attention, the output projection."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.config.schema import ModelConfig
from megatron.contract import Batch
from megatron.model.rotary import Rotary
from megatron.parallel.cost import ActivationBytes, Flops, MicroBatchShape
from megatron.parallel.linear import ColumnLinear, RowLinear
from megatron.parallel.random import DropoutKeys, drop, head_keys
from megatron.parallel.tensor_parallel import TensorParallel


class AttentionCache(Protocol):
    """Keys and values of earlier tokens, as attention asks for them; `inference/kv_cache.py` keeps them."""

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append a layer's new keys and values `[batch, groups, positions, head_dim]`; returns all of them."""
        ...


@dataclass(frozen=True)
class Masks:
    """Who may not see whom, and which attention weights are dropped.

    allowed: bool `[batch, 1, seq, keys]`, or None where plain causality says all, or where the keys are on several ranks.
    probability: of attention dropout; keys, None outside training: the random identity of the tokens.
    fused: leave the dropout to the attention kernel's own generator. documents: those of the batch, for a core attention
    whose keys are on several ranks.
    """

    allowed: Tensor | None = None
    probability: float = 0.0
    keys: DropoutKeys | None = None
    fused: bool = False
    documents: Tensor | None = None


def visible(batch: Batch, *, causal: bool) -> Tensor | None:
    """Return which tokens may see which within documents, bool `[batch, 1, seq, seq]`.

    None where there is one document, and the core attention alone says what is seen. None as well for a part of a sequence:
    its keys are in several places, and the core attention knows which.
    """
    if batch.documents is None or batch.places is not None:
        return None
    same = batch.documents.unsqueeze(2) == batch.documents.unsqueeze(1)  # [batch, seq, seq]
    return (same.tril() if causal else same).unsqueeze(1)


class Attend(Protocol):
    """Core attention: softmax(q k^T / sqrt(d)) v on the heads at hand. The model is handed one."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, masks: Masks, heads: Tensor) -> Tensor:
        """q: `[batch, heads, seq, head_dim]`; k, v: `[batch, groups, keys, head_dim]`; the result is like q.

        heads: int32 `[heads]`, the keys of the dropout's random numbers.
        """
        ...


def causal_attention(q: Tensor, k: Tensor, v: Tensor, masks: Masks, heads: Tensor) -> Tensor:
    """Each token sees itself and what came before; the queries are the last of the keys' positions."""
    square, allowed = q.shape[2] == k.shape[2], masks.allowed
    drawn = masks.keys is not None and masks.probability > 0.0 and not masks.fused
    if allowed is None and q.shape[2] > 1 and (drawn or not square):
        allowed = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(k.shape[2] - q.shape[2])
    return _attention(q, k, v, masks, heads, allowed, causal=allowed is None and square)


def bidirectional_attention(q: Tensor, k: Tensor, v: Tensor, masks: Masks, heads: Tensor) -> Tensor:
    """Each token sees all tokens, or all that `masks.allowed` lets it see."""
    return _attention(q, k, v, masks, heads, masks.allowed, causal=False)


def _attention(q: Tensor, k: Tensor, v: Tensor, masks: Masks, heads: Tensor, allowed: Tensor | None, *, causal: bool) -> Tensor:
    """allowed: bool, to be broadcast to `[batch, heads, seq, keys]`; None: all, or with `causal` what came before."""
    if k.shape[1] != q.shape[1]:  # grouped queries: each key-value head serves several query heads
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    if masks.keys is None or masks.probability == 0.0 or masks.fused:
        probability = 0.0 if masks.keys is None else masks.probability
        return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, dropout_p=probability, is_causal=causal)
    # Dropped weights are a function of their global place, which no fused kernel can draw: the plain form.
    scores = (q @ k.transpose(-1, -2)).mul_(q.shape[-1] ** -0.5)  # a scaled copy of q would be kept for the backward pass
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)
    weights = scores.softmax(dim=-1)
    return drop(weights, masks.keys.attention(heads), masks.probability) @ v


class Attention(nn.Module):
    """`[seq, batch, hidden] -> [seq, batch, hidden]`.

    The fused weight's rows are ordered `[groups, heads per group + 2, head_dim]`: the queries of a key-value head, its
    key, its value. So a slice of rows is a number of whole groups, for any tensor-parallel size that divides them.
    """

    def __init__(self, config: ModelConfig, layer: int, tp: TensorParallel, attend: Attend, *, seed: int) -> None:
        super().__init__()
        hidden, heads = config.hidden_size, config.num_attention_heads
        groups, self.head_dim = config.num_query_groups, config.kv_channels
        if heads % groups:
            raise ValueError(f"{heads} heads do not divide into {groups} groups")
        own = tp.share(groups, f"{heads} heads in {groups} groups")
        self.layer, self.attend = layer, attend
        self.dropout, self.fused_dropout = config.attention_dropout, config.fused_attention_dropout
        self.groups, self.per_group = len(own), heads // groups
        self.heads = self.groups * self.per_group
        keys = head_keys(seed, layer, range(own.start * self.per_group, own.stop * self.per_group))
        self.register_buffer("keys", keys, persistent=False)
        bias = config.add_bias_linear
        rows = (heads + 2 * groups) * self.head_dim
        self.qkv = ColumnLinear(hidden, rows, tp, bias=bias)
        self.dense = RowLinear(heads * self.head_dim, hidden, tp, bias=bias, init="output")

    def flops(self, seq: int) -> Flops:
        """Return the FLOPs of one token's scores with the whole sequence, and of the weighted sum of the values."""
        return Flops(core=2 * 2 * seq * self.qkv.tp.size * self.heads * self.head_dim)

    def activation_bytes(self, shape: MicroBatchShape) -> ActivationBytes:
        """Return the bytes of queries, keys and values, and what the core attention says of itself, or torch's takes."""
        own = ActivationBytes(saved=shape.element * shape.tokens * self.qkv.weight.shape[0])
        if hasattr(self.attend, "activation_bytes"):
            said: ActivationBytes = self.attend.activation_bytes(shape, self.heads, self.groups, self.head_dim, self.dropout)
            return own + said
        core = 2 * (self.heads - self.groups) * self.head_dim * shape.element  # repeated keys and values
        if self.dropout > 0.0 and not self.fused_dropout:
            core += (2 * shape.element + 1) * self.heads * shape.seq  # softmax, its mask, what is left
        return own + ActivationBytes(saved=core * shape.tokens, core=core * shape.tokens)

    def forward(self, x: Tensor, masks: Masks, rotary: Rotary | None, cache: AttentionCache | None) -> Tensor:
        mixed = self.qkv(x)
        seq, batch = mixed.shape[:2]
        mixed = mixed.view(seq, batch, self.groups, self.per_group + 2, self.head_dim)
        if self.per_group == 1:
            q, k, v = mixed.unbind(3)  # [seq, batch, heads, head_dim]
        else:
            q, k, v = mixed.split([self.per_group, 1, 1], dim=3)
            q, k, v = q.flatten(2, 3), k.squeeze(3), v.squeeze(3)
        if rotary is not None:
            q, k = rotary.turn(q), rotary.turn(k)
        if rotary is not None or self.per_group > 1:  # the queries are copies now; views would keep all of `mixed` in memory
            k, v = k.contiguous(), v.contiguous()
        q, k, v = (y.permute(1, 2, 0, 3) for y in (q, k, v))  # [batch, heads, seq, head_dim]
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        y: Tensor = self.attend(q, k, v, masks, self.get_buffer("keys"))
        y = y.permute(2, 0, 1, 3).reshape(seq, batch, self.heads * self.head_dim)
        projected: Tensor = self.dense(y)
        return projected
