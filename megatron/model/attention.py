"""Self-attention: one projection to queries, keys and values, the core attention, the output projection.

Multi-head attention of arXiv 1706.03762; with fewer key-value heads than query heads, grouped-query attention of 2305.13245.
"""

from __future__ import annotations

from collections.abc import Callable
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
    """Keys and values of earlier tokens; `inference/kv_cache.py` keeps them."""

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, core_attention: Callable[[Tensor, Tensor, Tensor], Tensor]
    ) -> Tensor:
        """Append a layer's new keys and values; return the attended values of the new tokens, `[batch, heads, seq, head_dim]`.

        Args:
            layer: global number of the layer.
            q: `[batch, heads, seq, head_dim]`.
            k: `[batch, groups, seq, head_dim]`.
            v: like k.
            core_attention: attention of the new tokens' queries to all keys and values, aligned at their ends.
        """
        ...


@dataclass(frozen=True)
class AttentionContext:
    """Attention mask and attention-dropout state of one micro-batch.

    Attributes:
        mask: bool `[batch, 1, queries, keys]`, True where a query may attend to a key. None if the core attention's own rule,
            causal or bidirectional, is the only restriction, or if the keys are on several ranks.
        dropout: probability that an attention weight is dropped.
        dropout_keys: random keys of the tokens; None outside training.
        fused_dropout: the attention kernel draws the dropout mask from its own generator.
        documents: document numbers of the batch `[batch, seq]`, for a core attention whose keys are on several ranks.
    """

    mask: Tensor | None = None
    dropout: float = 0.0
    dropout_keys: DropoutKeys | None = None
    fused_dropout: bool = False
    documents: Tensor | None = None


def attention_mask(batch: Batch, *, causal: bool) -> Tensor | None:
    """Return the mask that keeps attention within documents, bool `[batch, 1, seq, seq]`, True where a token may attend.

    None when each row is one document, so that the core attention's own rule is enough. None as well under context parallelism,
    where the core attention applies `AttentionContext.documents` to the keys of each rank.
    """
    if batch.documents is None or batch.places is not None:
        return None
    same_document = batch.documents.unsqueeze(2) == batch.documents.unsqueeze(1)  # [batch, seq, seq]
    return (same_document.tril() if causal else same_document).unsqueeze(1)  # [batch, 1, seq, seq]


class CoreAttention(Protocol):
    """Core attention: softmax(q k^T / sqrt(head_dim)) v on the heads of this process. It is passed to the model."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, context: AttentionContext, head_keys: Tensor) -> Tensor:
        """Return the attended values, `[batch, heads, seq, head_dim]`.

        Args:
            q: `[batch, heads, seq, head_dim]`.
            k: `[batch, groups, keys, head_dim]`.
            v: like k.
            context: mask and dropout of the micro-batch.
            head_keys: int32 `[heads]`, the random keys of the heads, for dropout.
        """
        ...


def causal_attention(q: Tensor, k: Tensor, v: Tensor, context: AttentionContext, head_keys: Tensor) -> Tensor:
    """Attend from each token to itself and the tokens before it. The queries are the last of the keys' positions.

    Args:
        q: `[batch, heads, seq, head_dim]`.
        k: `[batch, groups, keys, head_dim]`.
        v: like k.
        context: mask and dropout of the micro-batch.
        head_keys: int32 `[heads]`.
    """
    queries, keys, mask = q.shape[2], k.shape[2], context.mask
    is_unfused = context.dropout_keys is not None and context.dropout > 0.0 and not context.fused_dropout
    # The kernel's causal rule aligns the first query with the first key. With a cache the last query belongs to the last key,
    # and the unfused form has no causal rule: both need the triangle as a mask. A single query attends to all keys.
    if mask is None and queries > 1 and (is_unfused or queries != keys):
        mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)  # [seq, keys]
    return _attention(q, k, v, context, head_keys, mask, kernel_is_causal=mask is None and queries == keys)


def bidirectional_attention(q: Tensor, k: Tensor, v: Tensor, context: AttentionContext, head_keys: Tensor) -> Tensor:
    """Attend from each token to all tokens, or to those that `context.mask` allows.

    Args:
        q: `[batch, heads, seq, head_dim]`.
        k: `[batch, groups, keys, head_dim]`.
        v: like k.
        context: mask and dropout of the micro-batch.
        head_keys: int32 `[heads]`.
    """
    return _attention(q, k, v, context, head_keys, context.mask, kernel_is_causal=False)


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    context: AttentionContext,
    head_keys: Tensor,
    mask: Tensor | None,
    *,
    kernel_is_causal: bool,
) -> Tensor:
    """Return softmax(q k^T / sqrt(d)) v, `[batch, heads, seq, head_dim]`. mask: bool, broadcast to the scores, or None."""
    if q.shape[2] == 1 and k.shape[1] != q.shape[1] and context.dropout_keys is None and mask is None:
        # One query attends to all keys. The query heads of a key-value head become rows of one matrix, so that keys and values
        # need not be repeated.
        grouped = q.view(*k.shape[:2], -1, q.shape[3])  # [batch, groups, heads per group, head_dim]
        return F.scaled_dot_product_attention(grouped, k, v).reshape(q.shape)  # [batch, heads, 1, head_dim]
    if k.shape[1] != q.shape[1]:  # grouped queries: each key-value head serves several query heads
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))  # [batch, heads, keys, head_dim]
    if context.dropout_keys is None or context.dropout == 0.0 or context.fused_dropout:
        dropout = 0.0 if context.dropout_keys is None else context.dropout
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=kernel_is_causal)
    # Unfused, because the dropout mask is a function of global positions, which fused kernels cannot compute.
    # Scaled in place after the product, because a scaled copy of q would be saved for the backward pass.
    scores = (q @ k.transpose(-1, -2)).mul_(q.shape[-1] ** -0.5)  # [batch, heads, seq, keys]
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    weights = scores.softmax(dim=-1)  # [batch, heads, seq, keys]
    weights = drop(weights, context.dropout_keys.attention(head_keys), context.dropout)
    return weights @ v  # [batch, heads, seq, head_dim]


class Attention(nn.Module):
    """Self-attention, `[seq, batch, hidden] -> [seq, batch, hidden]`.

    The rows of the fused qkv weight are ordered `[groups, heads per group + 2, head_dim]`: for each key-value head its queries,
    its key, its value. So a tensor-parallel rank's rows are whole groups, for any tensor-parallel size that divides them.
    """

    def __init__(
        self, config: ModelConfig, layer: int, tp: TensorParallel, core_attention: CoreAttention, *, seed: int
    ) -> None:
        super().__init__()
        hidden, heads = config.hidden_size, config.num_attention_heads
        groups, self.head_dim = config.num_query_groups, config.kv_channels
        if heads % groups:
            raise ValueError(f"{heads} heads do not divide into {groups} groups")
        own_groups = tp.share(groups, f"{heads} heads in {groups} groups")
        self.layer, self.core_attention = layer, core_attention
        self.dropout, self.fused_dropout = config.attention_dropout, config.fused_attention_dropout
        # The groups and heads of this process: all of them without tensor parallelism.
        self.groups, self.heads_per_group = len(own_groups), heads // groups
        self.heads = self.groups * self.heads_per_group
        own_heads = range(own_groups.start * self.heads_per_group, own_groups.stop * self.heads_per_group)
        self.register_buffer("head_keys", head_keys(seed, layer, own_heads), persistent=False)
        bias = config.add_bias_linear
        qkv_features = (heads + 2 * groups) * self.head_dim
        self.qkv = ColumnLinear(hidden, qkv_features, tp, bias=bias)
        self.dense = RowLinear(heads * self.head_dim, hidden, tp, bias=bias, init="output")

    def flops(self, seq: int) -> Flops:
        """Return the FLOPs of one token's scores with the whole sequence, and of the weighted sum of the values."""
        return Flops(core=2 * 2 * seq * self.qkv.tp.size * self.heads * self.head_dim)

    def activation_bytes(self, shape: MicroBatchShape) -> ActivationBytes:
        """Return the bytes of queries, keys, values and core attention, which may report its own; by default torch's."""
        qkv = ActivationBytes(saved=shape.element * shape.tokens * self.qkv.weight.shape[0])
        if hasattr(self.core_attention, "activation_bytes"):
            core: ActivationBytes = self.core_attention.activation_bytes(
                shape, self.heads, self.groups, self.head_dim, self.dropout
            )
            return qkv + core
        per_token = 2 * (self.heads - self.groups) * self.head_dim * shape.element  # repeated keys and values
        if self.dropout > 0.0 and not self.fused_dropout:
            per_token += (2 * shape.element + 1) * self.heads * shape.seq  # softmax, its dropout mask, the dropped weights
        return qkv + ActivationBytes(saved=per_token * shape.tokens, core=per_token * shape.tokens)

    def forward(self, x: Tensor, context: AttentionContext, rotary: Rotary | None, cache: AttentionCache | None) -> Tensor:
        """Attend over the sequence, and over the cache's tokens before it.

        Args:
            x: `[seq, batch, hidden]`; under sequence parallelism, this rank's slice of the sequence.
            context: mask and dropout of the micro-batch.
            rotary: rotation of queries and keys; None with learned positions.
            cache: keys and values of earlier tokens; None in training.

        Returns:
            A tensor like x.
        """
        qkv = self.qkv(x)  # [seq, batch, groups * (heads_per_group + 2) * head_dim]
        seq, batch = qkv.shape[:2]
        # [seq, batch, groups, heads_per_group + 2, head_dim]
        qkv = qkv.view(seq, batch, self.groups, self.heads_per_group + 2, self.head_dim)
        if self.heads_per_group == 1:
            q, k, v = qkv.unbind(3)  # each [seq, batch, heads, head_dim]
        else:
            q, k, v = qkv.split([self.heads_per_group, 1, 1], dim=3)
            q = q.flatten(2, 3)  # [seq, batch, heads, head_dim]
            k, v = k.squeeze(3), v.squeeze(3)  # [seq, batch, groups, head_dim]
        if rotary is not None:
            q, k = rotary.rotate(q), rotary.rotate(k)
        if rotary is not None or self.heads_per_group > 1:
            # q is a copy here; k and v as views would keep all of `qkv` in memory.
            k, v = k.contiguous(), v.contiguous()
        q = q.permute(1, 2, 0, 3)  # [batch, heads, seq, head_dim]
        k, v = k.permute(1, 2, 0, 3), v.permute(1, 2, 0, 3)  # [batch, groups, seq, head_dim]
        keys = self.get_buffer("head_keys")
        # [batch, heads, seq, head_dim]
        if cache is None:
            y: Tensor = self.core_attention(q, k, v, context, keys)
        else:
            y = cache.attend(self.layer, q, k, v, lambda q, k, v: self.core_attention(q, k, v, context, keys))
        y = y.permute(2, 0, 1, 3).reshape(seq, batch, self.heads * self.head_dim)  # [seq, batch, heads * head_dim]
        projected: Tensor = self.dense(y)  # [seq, batch, hidden]
        return projected
