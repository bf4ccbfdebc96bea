"""Context parallelism: one sequence on several ranks, and exact attention around the ring of them (arXiv 2310.01889).

The sequence is cut into 2n chunks for n ranks. Rank r holds chunks r and 2n - 1 - r (arXiv 2407.21783, section 3.3.2), an
early and a late one, so that causality leaves every rank the same work. For 4 ranks, with a mark for each block of scores
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

Everything in a model but attention is per token, so only attention learns of it. Its keys and values travel around the ring
while those at hand are used: three blocks in the first step, two in each later one, 2n + 1 in all, on every rank. The
results of the blocks are joined by their running log-sum-exp (arXiv 2205.14135), kept in fp32. The backward pass goes around
once more and makes the scores of each block again; the gradients of keys and values travel along in fp32, and are home when
they have seen every rank. No tensor is larger than one block of scores.

The blocks are matrix products and softmax statistics. A fused kernel would serve where it tells its log-sum-exp and takes
the one of the whole row for its backward pass; torch has none that is public, eager and differentiable.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron.contract import Batch
from megatron.mesh.mesh import Axis
from megatron.parallel.collectives import start_shift
from megatron.parallel.cost import ActivationBytes, MicroBatchShape
from megatron.parallel.random import DropoutKeys, drop


def chunks_of(rank: int, size: int) -> tuple[int, int]:
    """The two chunks of the sequence that a rank holds, of 2 x size."""
    return rank, 2 * size - 1 - rank


@dataclass(frozen=True)
class Block:
    """One block of scores: chunk `queries` of the sequence against chunk `keys`.

    query_half, key_half: which of its holder's two chunks each is, 0 or 1.
    """

    queries: int
    keys: int
    query_half: int
    key_half: int

    @property
    def diagonal(self) -> bool:
        """Whether queries and keys are of the same tokens."""
        return self.queries == self.keys


def blocks_of(rank: int, source: int, size: int, *, causal: bool = True) -> list[Block]:
    """The queries of `rank` against the keys of `source`; with `causal`, what causality leaves of them.

    Blocks on the diagonal come first: there every token sees itself, so no later sum starts from nothing.
    """
    queries, keys = chunks_of(rank, size), chunks_of(source, size)
    found = [Block(queries[i], keys[j], i, j) for i in (0, 1) for j in (0, 1) if not causal or keys[j] <= queries[i]]
    return sorted(found, key=lambda block: not block.diagonal)


def share(batch: Batch, cp: Axis) -> Batch:
    """This rank's part of a micro-batch: `[micro_batch, seq]` -> `[micro_batch, seq / cp]`, chunk r, then chunk 2n - 1 - r.

    `documents` stay whole, since the keys come from everywhere. ValueError when the sequence has no 2 x cp equal chunks.
    """
    if cp.size == 1:
        return batch
    seq = batch.tokens.shape[1]
    if seq % (2 * cp.size):
        raise ValueError(f"a sequence of {seq} tokens does not cut into 2 x {cp.size} equal chunks for context parallelism")
    width = seq // (2 * cp.size)
    starts = [chunk * width for chunk in chunks_of(cp.rank, cp.size)]
    places = torch.cat([torch.arange(start, start + width, device=batch.tokens.device) for start in starts])
    names = [n for n in ("tokens", "labels", "loss_mask", "positions", "segments") if getattr(batch, n) is not None]
    cut = {name: getattr(batch, name)[:, places] for name in names}
    return replace(batch, **cut, places=places)


class RingMasks(Protocol):
    """What ring attention reads of `model.attention.Masks`."""

    @property
    def documents(self) -> Tensor | None: ...
    @property
    def probability(self) -> float: ...
    @property
    def keys(self) -> DropoutKeys | None: ...


class RingAttention:
    """A `model.attention.Attend` for ranks that hold the parts of a sequence that `share` gives them.

    cp: the context-parallel axis. Collective over it, forward and backward. causal: a token sees itself and what came before;
    else it sees all.
    """

    def __init__(self, cp: Axis, *, causal: bool = True) -> None:
        self.cp, self.causal = cp, causal

    def activation_bytes(
        self, shape: MicroBatchShape, heads: int, groups: int, head_dim: int, dropout: float
    ) -> ActivationBytes:
        """Return the bytes of the heads of one rank: an fp32 number for each query and head is kept, and nothing that grows
        with seq; the rest, an estimate, is there in the backward pass alone.

        Blocks of scores, `[micro_batch, heads, chunk, chunk]` in fp32 with a chunk of half of the rank's tokens: three, with
        dropout six. Of keys and values those at hand and those that arrive, and in fp32 three gradients: made here, leaving
        and arriving. Of the queries copies of three tensors in the compute dtype, and in fp32 two of their gradients.
        """
        statistics = 4 * heads * shape.tokens
        blocks = (6 if dropout > 0.0 else 3) * 4 * heads * (shape.seq // 2) ** 2
        travelling = 2 * groups * head_dim * shape.seq * (2 * shape.element + 3 * 4)
        queries = heads * head_dim * shape.seq * (3 * shape.element + 2 * 4)
        return ActivationBytes(statistics, core=statistics, transient=shape.rows * (blocks + travelling + queries))

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, masks: RingMasks, heads: Tensor) -> Tensor:
        """q: `[batch, heads, seq / cp, head_dim]`; k, v: `[batch, groups, seq / cp, head_dim]`; the result is like q.

        heads: int32 `[heads]`, the keys of the dropout's random numbers. ValueError for an odd number of tokens, and for
        keys that are not the queries' own, as those of a generation's cache.
        """
        if q.shape[2] % 2 or q.shape[2] != k.shape[2]:
            raise ValueError(
                f"ring attention takes two equal chunks of a sequence, not {q.shape[2]} queries and {k.shape[2]} keys; "
                "generate with context-parallel size 1"
            )
        context = _Context(self.cp, self.causal, masks.documents, masks.keys, masks.probability, heads)
        result: Tensor = _Ring.apply(q, k, v, context)  # type: ignore[no-untyped-call]
        return result


@dataclass(frozen=True)
class _Context:
    """What forward and backward both need beside queries, keys and values."""

    cp: Axis
    causal: bool
    documents: Tensor | None
    keys: DropoutKeys | None
    probability: float
    heads: Tensor

    def steps(self) -> Iterator[list[Block]]:
        """The blocks of each step: first with the own keys, then with those of the rank before, and so on."""
        for step in range(self.cp.size):
            yield blocks_of(self.cp.rank, (self.cp.rank - step) % self.cp.size, self.cp.size, causal=self.causal)

    def scores(self, query: Tensor, key: Tensor, block: Block) -> Tensor:
        """`[batch, groups, queries, keys]` in fp32 or better, minus infinity where a token may not look.

        query: `[batch, groups, heads per group x chunk, head_dim]`. key: `[batch, groups, chunk, head_dim]`.
        """
        scores = query @ key.transpose(-1, -2)
        scores = scores.to(_statistics(scores))
        width = key.shape[2]
        allowed: Tensor | None = None
        if block.diagonal and self.causal:
            allowed = torch.ones(width, width, dtype=torch.bool, device=key.device).tril()
        if self.documents is not None:
            rows, columns = (self.documents[:, c * width : (c + 1) * width] for c in (block.queries, block.keys))
            same = (rows.unsqueeze(2) == columns.unsqueeze(1)).unsqueeze(1)  # [batch, 1, chunk, chunk]
            allowed = same if allowed is None else same & allowed
        if allowed is not None:
            scores.view(-1, self.heads.numel(), width, width).masked_fill_(~allowed, -torch.inf)
        return scores

    def dropped(self, x: Tensor, block: Block) -> Tensor:
        """Dropout of `[batch, groups, queries, keys]`: the numbers that one process draws for these weights."""
        if self.keys is None or self.probability == 0.0:
            return x
        width = x.shape[-1]
        queries = slice(block.query_half * width, (block.query_half + 1) * width)
        numbers = self.keys.attention(self.heads, queries, range(block.keys * width, (block.keys + 1) * width))
        return drop(x, numbers.view_as(x), self.probability)


def _statistics(x: Tensor) -> torch.dtype:
    """The dtype of sums and softmax statistics."""
    return torch.promote_types(x.dtype, torch.float32)


def _halves(x: Tensor, groups: int) -> list[Tensor]:
    """`[batch, heads, seq, dim]` -> two of `[batch, groups, heads per group x seq / 2, dim]`.

    The heads of a group become rows of one matrix, so that keys and values are never repeated for them.
    """
    return [half.reshape(x.shape[0], groups, -1, x.shape[3]) for half in x.chunk(2, dim=2)]


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, context: _Context) -> Tensor:
        batch, heads, seq, width = q.shape
        queries = _halves(q * width**-0.5, k.shape[1])
        sums = [torch.zeros_like(query, dtype=_statistics(q)) for query in queries]
        totals = [torch.full_like(each[..., :1], -torch.inf) for each in sums]  # log-sum-exp of the scores so far
        held = torch.stack([k, v])
        for step, blocks in enumerate(context.steps()):
            arriving = start_shift(held, context.cp) if step + 1 < context.cp.size else None
            for block in blocks:
                i, (key, value) = block.query_half, held.chunk(2, dim=3)[block.key_half]
                scores = context.scores(queries[i], key, block)
                total = torch.logaddexp(totals[i], scores.logsumexp(dim=-1, keepdim=True))
                weights = context.dropped(scores.sub_(total).exp_(), block)
                sums[i].mul_((totals[i] - total).exp_()).add_(weights.to(q.dtype) @ value)
                totals[i] = total
            if arriving is not None:
                held = arriving.wait()
        # Sequence-first in memory, as the layer after it wants it: both then keep the same tensor.
        y = q.new_empty(seq, batch, heads, width).permute(1, 2, 0, 3)
        for half, result in zip(y.chunk(2, dim=2), sums, strict=True):
            half.copy_(result.view(half.shape))
        ctx.save_for_backward(q, k, v, y, *totals)
        ctx.context = context
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, y, *totals = ctx.saved_tensors
        context, groups, exact = ctx.context, k.shape[1], _statistics(q)
        scale = q.shape[3] ** -0.5
        queries, above = _halves(q * scale, groups), _halves(grads[0], groups)
        # Of a softmax's gradient, the part that all of a row's weights share.
        shared = [(a.to(exact) * b.to(exact)).sum(-1, keepdim=True) for a, b in zip(above, _halves(y, groups), strict=True)]
        grad_queries = [torch.zeros_like(query, dtype=exact) for query in queries]
        held, travelling = torch.stack([k, v]), None
        for step, blocks in enumerate(context.steps()):
            arriving = start_shift(held, context.cp) if step + 1 < context.cp.size else None
            grad_held = torch.zeros_like(held, dtype=exact)
            for block in blocks:
                i, (key, value) = block.query_half, held.chunk(2, dim=3)[block.key_half]
                grad_key, grad_value = grad_held.chunk(2, dim=3)[block.key_half]
                weights = context.scores(queries[i], key, block).sub_(totals[i]).exp_()
                grad_value += context.dropped(weights, block).to(q.dtype).transpose(-1, -2) @ above[i]
                slope = context.dropped((above[i] @ value.transpose(-1, -2)).to(exact), block)
                slope = weights.mul_(slope - shared[i]).to(q.dtype)
                grad_queries[i] += slope @ key
                grad_key += slope.transpose(-1, -2) @ queries[i]
            if travelling is not None:
                grad_held += travelling.wait()  # what the ranks before have added for these keys
            travelling = start_shift(grad_held, context.cp)
            if arriving is not None:
                held = arriving.wait()
        half = (q.shape[0], q.shape[1], -1, q.shape[3])
        grad_q = torch.cat([grad.view(half) for grad in grad_queries], dim=2).mul_(scale)
        grad_k, grad_v = travelling.wait() if travelling is not None else grad_held
        return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype), None
