"""Context parallelism: one sequence divided over several ranks, with exact ring attention (arXiv 2310.01889).

For n ranks the sequence is divided into 2n chunks. Rank r holds chunks r and 2n - 1 - r (arXiv 2407.21783, section 3.3.2), an
early and a late one, so that causal attention gives every rank the same work. For 4 ranks, with a dot for each block of scores
that is computed, and x for one on the diagonal:

    keys of      0  1  2  3  4  5  6  7      computed by
    queries 0    x                           rank 0
            1    .  x                        rank 1
            2    .  .  x                     rank 2
            3    .  .  .  x                  rank 3
            4    .  .  .  .  x               rank 3
            5    .  .  .  .  .  x            rank 2
            6    .  .  .  .  .  .  x         rank 1
            7    .  .  .  .  .  .  .  x      rank 0

All of a model but attention works on each token alone, so only attention depends on the layout. Keys and values are passed
around the ring while the previous ones are used: each rank computes three blocks in the first step and two in each later one,
2n + 1 in all. The results of the blocks are combined by their running log-sum-exp (arXiv 2205.14135), kept in fp32. The
backward pass goes around the ring once more and recomputes the scores of each block. The gradients of keys and values are
passed along in fp32, and return to their rank after a full turn. No tensor is larger than one block of scores.

The blocks are computed with matrix products and softmax statistics. A fused kernel could replace them if it returned its
log-sum-exp and accepted that of the whole row for its backward pass; torch has none that is public, eager and differentiable.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron.contract import Batch
from megatron.mesh.mesh import Axis
from megatron.parallel.collectives import ring_shift_async
from megatron.parallel.cost import ActivationBytes, MicroBatchShape
from megatron.parallel.random import DropoutKeys, drop


def rank_chunks(rank: int, size: int) -> tuple[int, int]:
    """Return the numbers of a rank's two chunks, of the 2 x size chunks of the sequence."""
    return rank, 2 * size - 1 - rank


@dataclass(frozen=True)
class ScoreBlock:
    """One block of scores: the queries of one chunk against the keys of another.

    Attributes:
        queries: number of the queries' chunk, 0 to 2n - 1.
        keys: number of the keys' chunk.
        query_half: 0 or 1 if the queries' chunk is the first or second chunk of its rank.
        key_half: likewise for the keys' chunk.
    """

    queries: int
    keys: int
    query_half: int
    key_half: int

    @property
    def diagonal(self) -> bool:
        """True if queries and keys belong to the same tokens."""
        return self.queries == self.keys


def score_blocks(rank: int, source: int, size: int, *, causal: bool = True) -> list[ScoreBlock]:
    """Return the blocks of the queries of `rank` against the keys of `source`.

    Blocks on the diagonal come first. Every token attends to itself there, so the running log-sum-exp is finite from then on.

    Args:
        rank: the rank of the queries.
        source: the rank of the keys.
        size: number of context-parallel ranks.
        causal: leave out the blocks whose keys all come after the queries.
    """
    queries, keys = rank_chunks(rank, size), rank_chunks(source, size)
    blocks = [ScoreBlock(queries[i], keys[j], i, j) for i in (0, 1) for j in (0, 1) if not causal or keys[j] <= queries[i]]
    return sorted(blocks, key=lambda block: not block.diagonal)


def shard_batch(batch: Batch, cp: Axis) -> Batch:
    """Return this rank's part of a micro-batch: `[batch, seq]` -> `[batch, seq / cp]`, chunk r, then chunk 2n - 1 - r.

    `documents` stay whole, since the keys of all ranks are compared with them.

    Raises:
        ValueError: the sequence does not divide into 2 x cp equal chunks.
    """
    if cp.size == 1:
        return batch
    seq = batch.tokens.shape[1]
    if seq % (2 * cp.size):
        raise ValueError(f"a sequence of {seq} tokens does not cut into 2 x {cp.size} equal chunks for context parallelism")
    width = seq // (2 * cp.size)
    starts = [chunk * width for chunk in rank_chunks(cp.rank, cp.size)]
    places = torch.cat([torch.arange(start, start + width, device=batch.tokens.device) for start in starts])  # [seq / cp]
    names = [n for n in ("tokens", "labels", "loss_mask", "positions", "segments") if getattr(batch, n) is not None]
    parts = {name: getattr(batch, name)[:, places] for name in names}  # each [batch, seq / cp]
    return replace(batch, **parts, places=places)


class RingContext(Protocol):
    """The part of `model.attention.AttentionContext` that ring attention reads."""

    @property
    def documents(self) -> Tensor | None:
        """Document numbers `[batch, seq]` of whole sequences."""
        ...

    @property
    def dropout(self) -> float:
        """Probability of attention dropout."""
        ...

    @property
    def dropout_keys(self) -> DropoutKeys | None:
        """Random keys of this rank's tokens; None outside training."""
        ...


class RingAttention:
    """A `model.attention.CoreAttention` for sequences that `shard_batch` has divided over the ranks.

    Collective over the context-parallel axis, forward and backward.

    Args:
        cp: the context-parallel axis.
        causal: a token attends only to itself and the tokens before it; otherwise to all tokens.
    """

    def __init__(self, cp: Axis, *, causal: bool = True) -> None:
        self.cp, self.causal = cp, causal

    def activation_bytes(
        self, shape: MicroBatchShape, heads: int, groups: int, head_dim: int, dropout: float
    ) -> ActivationBytes:
        """Return the bytes of the activations of one rank's heads.

        One fp32 number for each query and head is saved, the log-sum-exp. The rest, an estimate, exists only in the backward
        pass: three blocks of scores, with dropout six, each `[batch, heads, chunk, chunk]` in fp32 with a chunk of half the
        rank's tokens; the present and the arriving keys and values; three of their gradients in fp32, computed, sent and
        received; three tensors like the queries in the compute dtype, and two of their gradients in fp32.

        Args:
            shape: the micro-batch on this rank.
            heads: query heads on this rank.
            groups: key-value heads on this rank.
            head_dim: channels of a head.
            dropout: dropout probability.
        """
        statistics = 4 * heads * shape.tokens
        blocks = (6 if dropout > 0.0 else 3) * 4 * heads * (shape.seq // 2) ** 2
        keys_and_values = 2 * groups * head_dim * shape.seq * (2 * shape.element + 3 * 4)
        queries = heads * head_dim * shape.seq * (3 * shape.element + 2 * 4)
        return ActivationBytes(statistics, core=statistics, transient=shape.rows * (blocks + keys_and_values + queries))

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, context: RingContext, head_keys: Tensor) -> Tensor:
        """Return the attended values of this rank's queries, of the shape of q.

        Args:
            q: `[batch, heads, seq / cp, head_dim]`.
            k: `[batch, groups, seq / cp, head_dim]`.
            v: like k.
            context: documents and dropout of the micro-batch.
            head_keys: int32 `[heads]`, the random keys of the heads, for dropout.

        Raises:
            ValueError: the number of tokens is odd, or queries and keys differ in number, as with a cache in generation.
        """
        if q.shape[2] % 2 or q.shape[2] != k.shape[2]:
            raise ValueError(
                f"ring attention takes two equal chunks of a sequence, not {q.shape[2]} queries and {k.shape[2]} keys; "
                "generate with context-parallel size 1"
            )
        ring = _RingPass(self.cp, self.causal, context.documents, context.dropout_keys, context.dropout, head_keys)
        result: Tensor = _Ring.apply(q, k, v, ring)  # type: ignore[no-untyped-call]
        return result


@dataclass(frozen=True)
class _RingPass:
    """State of one call that forward and backward share, besides queries, keys and values; see `AttentionContext`."""

    cp: Axis
    causal: bool
    documents: Tensor | None
    dropout_keys: DropoutKeys | None
    dropout: float
    head_keys: Tensor

    def steps(self) -> Iterator[list[ScoreBlock]]:
        """Yield the blocks of each step: first with this rank's keys, then with those of the previous rank, and so on."""
        for step in range(self.cp.size):
            yield score_blocks(self.cp.rank, (self.cp.rank - step) % self.cp.size, self.cp.size, causal=self.causal)

    def scores(self, query: Tensor, key: Tensor, block: ScoreBlock) -> Tensor:
        """Return the scores of a block in fp32 or fp64, minus infinity where a token may not attend.

        Args:
            query: `[batch, groups, heads per group * chunk, head_dim]`, scaled by 1 / sqrt(head_dim).
            key: `[batch, groups, chunk, head_dim]`.
            block: the block, which gives the chunks of query and key.

        Returns:
            `[batch, groups, heads per group * chunk, chunk]`.
        """
        scores = query @ key.transpose(-1, -2)  # [batch, groups, heads per group * chunk, chunk]
        scores = scores.to(_accumulation_dtype(scores))
        width = key.shape[2]
        allowed: Tensor | None = None
        if block.diagonal and self.causal:
            allowed = torch.ones(width, width, dtype=torch.bool, device=key.device).tril()  # [chunk, chunk]
        if self.documents is not None:
            # Each [batch, chunk].
            rows, columns = (self.documents[:, c * width : (c + 1) * width] for c in (block.queries, block.keys))
            same = (rows.unsqueeze(2) == columns.unsqueeze(1)).unsqueeze(1)  # [batch, 1, chunk, chunk]
            allowed = same if allowed is None else same & allowed
        if allowed is not None:
            # A view as [batch, heads, chunk, chunk]: the mask is the same for every head.
            scores.view(-1, self.head_keys.numel(), width, width).masked_fill_(~allowed, -torch.inf)
        return scores

    def dropped(self, x: Tensor, block: ScoreBlock) -> Tensor:
        """Apply dropout to weights `[batch, groups, rows, chunk]`, with the mask that a single process would draw."""
        if self.dropout_keys is None or self.dropout == 0.0:
            return x
        width = x.shape[-1]
        queries = slice(block.query_half * width, (block.query_half + 1) * width)
        numbers = self.dropout_keys.attention(self.head_keys, queries, range(block.keys * width, (block.keys + 1) * width))
        return drop(x, numbers.view_as(x), self.dropout)


def _accumulation_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of sums and softmax statistics: fp32, or fp64 for fp64 inputs."""
    return torch.promote_types(x.dtype, torch.float32)


def _halves(x: Tensor, groups: int) -> list[Tensor]:
    """Split `[batch, heads, seq, dim]` into its two chunks, each `[batch, groups, heads per group * chunk, dim]`.

    The heads of a group become rows of one matrix, so that keys and values need not be repeated for them.
    """
    return [half.reshape(x.shape[0], groups, -1, x.shape[3]) for half in x.chunk(2, dim=2)]


class _Ring(torch.autograd.Function):
    """Exact ring attention; the softmax is computed block by block, with running statistics (arXiv 2205.14135)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, ring: _RingPass) -> Tensor:
        batch, heads, seq, width = q.shape  # seq: tokens of this rank
        # Below, "rows" are the queries of all heads of a group: heads per group * chunk, with chunk = seq / 2.
        queries = _halves(q * width**-0.5, k.shape[1])  # 2 x [batch, groups, rows, head_dim]
        sums = [torch.zeros_like(query, dtype=_accumulation_dtype(q)) for query in queries]  # like queries
        totals = [torch.full_like(sum_[..., :1], -torch.inf) for sum_ in sums]  # log-sum-exp so far, [..., rows, 1]
        held = torch.stack([k, v])  # [2, batch, groups, seq, head_dim]
        for step, blocks in enumerate(ring.steps()):
            arriving = ring_shift_async(held, ring.cp) if step + 1 < ring.cp.size else None
            for block in blocks:
                i, (key, value) = block.query_half, held.chunk(2, dim=3)[block.key_half]
                scores = ring.scores(queries[i], key, block)  # [batch, groups, rows, chunk]
                # Softmax over all keys so far: earlier sums are rescaled by exp(old total - new total).
                total = torch.logaddexp(totals[i], scores.logsumexp(dim=-1, keepdim=True))  # [batch, groups, rows, 1]
                weights = ring.dropped(scores.sub_(total).exp_(), block)  # [batch, groups, rows, chunk]
                sums[i].mul_((totals[i] - total).exp_()).add_(weights.to(q.dtype) @ value)
                totals[i] = total
            if arriving is not None:
                held = arriving.wait()
        # Sequence-first in memory, as the next layer reads it, so that both save the same tensor for the backward pass.
        y = q.new_empty(seq, batch, heads, width).permute(1, 2, 0, 3)  # [batch, heads, seq, head_dim]
        for half, result in zip(y.chunk(2, dim=2), sums, strict=True):
            half.copy_(result.view(half.shape))
        ctx.save_for_backward(q, k, v, y, *totals)
        ctx.ring = ring
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, y, *totals = ctx.saved_tensors
        ring, groups, exact = ctx.ring, k.shape[1], _accumulation_dtype(q)
        scale = q.shape[3] ** -0.5
        # 2 x [batch, groups, rows, head_dim] each.
        queries, above = _halves(q * scale, groups), _halves(grads[0], groups)
        # The softmax gradient is P * (dP - rowsum(P * dP)). Its row sum equals rowsum(y * dy) (arXiv 2205.14135, appendix B.2),
        # which does not depend on the block. Each [batch, groups, rows, 1].
        row_sums = [(a.to(exact) * b.to(exact)).sum(-1, keepdim=True) for a, b in zip(above, _halves(y, groups), strict=True)]
        grad_queries = [torch.zeros_like(query, dtype=exact) for query in queries]
        held, passing_grads = torch.stack([k, v]), None  # held: [2, batch, groups, seq, head_dim]
        for step, blocks in enumerate(ring.steps()):
            arriving = ring_shift_async(held, ring.cp) if step + 1 < ring.cp.size else None
            grad_held = torch.zeros_like(held, dtype=exact)  # [2, batch, groups, seq, head_dim]
            for block in blocks:
                i, (key, value) = block.query_half, held.chunk(2, dim=3)[block.key_half]
                grad_key, grad_value = grad_held.chunk(2, dim=3)[block.key_half]
                # Recomputed, not saved. From here on weights and slope are [batch, groups, rows, chunk].
                weights = ring.scores(queries[i], key, block).sub_(totals[i]).exp_()
                grad_value += ring.dropped(weights, block).to(q.dtype).transpose(-1, -2) @ above[i]
                slope = ring.dropped((above[i] @ value.transpose(-1, -2)).to(exact), block)
                slope = weights.mul_(slope - row_sums[i]).to(q.dtype)
                grad_queries[i] += slope @ key
                grad_key += slope.transpose(-1, -2) @ queries[i]
            if passing_grads is not None:
                grad_held += passing_grads.wait()  # the sum of the previous ranks' gradients of these keys and values
            passing_grads = ring_shift_async(grad_held, ring.cp)
            if arriving is not None:
                held = arriving.wait()
        half = (q.shape[0], q.shape[1], -1, q.shape[3])  # [batch, heads, chunk, head_dim]
        grad_q = torch.cat([grad.view(half) for grad in grad_queries], dim=2).mul_(scale)  # [batch, heads, seq, head_dim]
        grad_k, grad_v = passing_grads.wait() if passing_grads is not None else grad_held  # each [batch, groups, seq, head_dim]
        return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype), None
