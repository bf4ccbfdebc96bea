"""Fused output layer and cross-entropy, over a vocabulary that may be divided over the tensor-parallel axis.

Logits are the largest activation of a language model, and only the loss needs them. So the tokens are processed in chunks: the
logits of a chunk are computed, turned into losses and at once into gradients, and discarded. Only one chunk's logits are in
memory at a time, which on a CPU fit in its cache. With a divided vocabulary, three numbers per token are reduced instead of
gathering the logits (1909.08053): the maximum, the sum of exponentials, the label's logit. The logits of padding rows are set
to minus infinity, so the loss is that of the unpadded vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron.mesh.mesh import Axis
from megatron.parallel.collectives import all_reduce
from megatron.parallel.embedding import VocabShard

# Number of logits in a chunk: on a CPU they fit in its cache (16 MB in fp32), on a GPU the rows occupy it fully (0.5 GB).
CHUNK = {"cpu": 1 << 22, "cuda": 1 << 27}
MAX_FP16_ROWS = 4096  # with hidden states of up to 16, no sum over a chunk exceeds 65504, the largest fp16 number
MIN_ROWS = 256  # with fewer, reading and writing the weight's gradient for every chunk would dominate


def vocab_parallel_cross_entropy(logits: Tensor, labels: Tensor, shard: VocabShard, tp: Axis) -> tuple[Tensor, Tensor]:
    """Return the tokens' cross-entropies, and their gradients with respect to the logits.

    Loss and gradient of softmax cross-entropy: log(sum_j exp(x_j)) - x_label, and softmax(x) - onehot(label).

    Args:
        logits: `[tokens, padded_size]`, this rank's columns; overwritten.
        labels: int64 `[tokens]`, the same on every rank.
        shard: this rank's columns of the vocabulary.
        tp: the ranks over which the vocabulary is divided.

    Returns:
        Losses, fp32 `[tokens]`, equal on every rank; gradients, fp32 `[tokens, padded_size]`, of this rank's columns.
    """
    logits[:, shard.size :] = -torch.inf  # excludes padding from the softmax
    x = logits.float()  # [tokens, padded_size]
    local, elsewhere = _label_columns(labels, shard)  # [tokens, 1], [tokens]
    if tp.size == 1:
        x = x.log_softmax(dim=-1)
        losses, probabilities = -x.gather(-1, local).squeeze(-1), x.exp_()
    else:
        x = x - all_reduce(x.amax(dim=-1), tp, "max").unsqueeze(-1)  # [tokens, padded_size]
        # Each label is on one rank; the others add 0.
        at_label = x.gather(-1, local).squeeze(-1).masked_fill(elsewhere, 0.0)  # [tokens]
        exponentials = x.exp_()  # [tokens, padded_size]
        total, at_label = all_reduce(torch.stack([exponentials.sum(dim=-1), at_label]), tp)  # [tokens] each
        losses, probabilities = total.log() - at_label, exponentials.div_(total.unsqueeze(-1))
    # Subtract 1 at the label, on the rank that has its column.
    probabilities.scatter_add_(-1, local, elsewhere.to(x.dtype).unsqueeze(-1) - 1.0)
    return losses, probabilities


def _label_columns(labels: Tensor, shard: VocabShard) -> tuple[Tensor, Tensor]:
    """Return the labels' columns on this rank, int64 `[tokens, 1]`, and whether they are on another rank, bool `[tokens]`."""
    elsewhere = (labels < shard.start) | (labels >= shard.start + shard.size)
    return (labels - shard.start).masked_fill(elsewhere, 0).unsqueeze(-1), elsewhere


def _chunk_rows(x: Tensor, shard: VocabShard) -> int:
    """Return the number of tokens in a chunk; the same on every rank of tp."""
    return max(MIN_ROWS, CHUNK.get(x.device.type, CHUNK["cpu"]) // shard.padded_size)


def fused_linear_cross_entropy_bytes(tokens: int, hidden: int, padded_size: int, element: int) -> int:
    """Return the peak bytes of `fused_linear_cross_entropy` on a GPU, an upper bound for a CPU, whose chunks are smaller.

    The peak consists of the input and its gradient, tokens x hidden each; the weight's gradient, padded_size x hidden in fp32,
    and one chunk's contribution to it in the compute dtype; the logits of one chunk, in 16 bit also an fp32 copy of them; and
    the chunk's fp32 probabilities.

    Args:
        tokens: number of tokens on this rank.
        hidden: width of the hidden states.
        padded_size: rows of the vocabulary on this rank, including padding.
        element: bytes of an element in the compute dtype.
    """
    rows = min(tokens, max(MIN_ROWS, max(CHUNK.values()) // padded_size))
    chunk = rows * padded_size * (element + (4 if element < 4 else 0) + 4)
    return 2 * element * tokens * hidden + (4 + element) * padded_size * hidden + chunk


class _FusedLinearCrossEntropy(torch.autograd.Function):
    """Computes the loss and its gradients in the forward pass; the backward pass multiplies them by the incoming gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        mask: Tensor,
        shard: VocabShard,
        tp: Axis,
        rows: int,
        needs_grad: bool,
    ) -> Tensor:
        total = x.new_zeros((), dtype=torch.float32)
        grad_x = torch.empty_like(x) if needs_grad else None  # [tokens, hidden]
        grad_weight = torch.empty_like(weight, dtype=torch.float32) if needs_grad else None  # [padded_size, hidden]
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if needs_grad and bias is not None else None
        buffer = x.new_empty(min(rows, x.shape[0]), shard.padded_size)  # [rows, padded_size], reused by all chunks
        for first in range(0, x.shape[0], rows):
            chunk = slice(first, first + rows)
            logits = torch.mm(x[chunk], weight.t(), out=buffer[: x.shape[0] - first])  # [rows, padded_size]
            if bias is not None:
                logits += bias
            # [rows], [rows, padded_size]
            losses, grads = vocab_parallel_cross_entropy(logits, labels[chunk], shard, tp)
            total += losses @ mask[chunk]
            if grad_bias is not None:
                grad_bias += mask[chunk] @ grads
            if grad_x is not None and grad_weight is not None:
                # The mask is applied to the hidden-sized factors, which are much smaller than the logits' gradients.
                grads, counts = grads.to(x.dtype), mask[chunk].unsqueeze(-1).to(x.dtype)  # counts: [rows, 1]
                torch.mm(grads, weight, out=grad_x[chunk]).mul_(counts)
                counted = x[chunk] * counts  # [rows, hidden]
                if first == 0:
                    grad_weight.copy_(grads.t() @ counted)
                elif x.dtype == torch.float32:
                    grad_weight.addmm_(grads.t(), counted)
                else:  # the product in the compute dtype, summed over the chunks in fp32
                    grad_weight += grads.t() @ counted
        if grad_x is not None and grad_weight is not None:
            ctx.save_for_backward(grad_x, grad_weight, grad_bias)
            ctx.dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = grads[0]  # fp32 scalar
        # In place, because nothing else reads them; autograd raises an error for a second backward pass.
        grad_x, grad_weight, grad_bias = ctx.saved_tensors
        # fp16 is multiplied in fp32: a loss scale above 65504 is not representable in fp16, but its product can be.
        grad_x = (grad_x.float() * grad).to(grad_x.dtype) if grad_x.dtype == torch.float16 else grad_x.mul_(grad)
        grad_bias = None if grad_bias is None else grad_bias.mul_(grad).to(ctx.dtype)
        return grad_x, grad_weight.mul_(grad).to(ctx.dtype), grad_bias, *[None] * 6


def fused_linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    mask: Tensor,
    shard: VocabShard,
    tp: Axis,
    *,
    rows: int | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Return the sum over tokens of mask * cross-entropy of the logits `x weight^T + bias`.

    Args:
        x: `[tokens, hidden]`, whole on every rank; its gradient is this rank's part of a sum over tp.
        weight: `[padded_size, hidden]`, this rank's rows.
        labels: int64 `[tokens]` within the vocabulary.
        mask: fp32 `[tokens]`.
        shard: this rank's rows of the vocabulary.
        tp: the ranks over which the vocabulary is divided.
        rows: tokens per chunk, the same on every rank; the default depends on the device.
        bias: `[padded_size]`, this rank's part of the logits' bias, or None.

    Returns:
        fp32 scalar, equal on every rank of tp.
    """
    rows = rows or _chunk_rows(x, shard)
    if x.dtype == torch.float16:
        rows = min(rows, MAX_FP16_ROWS)
    needs_grad = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    arguments = (x, weight, bias, labels, mask, shard, tp, rows, needs_grad)
    loss: Tensor = _FusedLinearCrossEntropy.apply(*arguments)  # type: ignore[no-untyped-call]
    return loss


@torch.no_grad()
def label_scores(
    x: Tensor, weight: Tensor, labels: Tensor, shard: VocabShard, tp: Axis, rows: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return log-probabilities of the labels, and whether each label is the most probable token.

    Among equally probable tokens the one with the lowest id counts as the most probable, as in generation.

    Args:
        x: `[tokens, hidden]`, whole on every rank.
        weight: `[padded_size, hidden]`, this rank's rows.
        labels: int64 `[tokens]` within the vocabulary.
        shard: this rank's rows of the vocabulary.
        tp: the ranks over which the vocabulary is divided.
        rows: tokens per chunk, the same on every rank; the default depends on the device.

    Returns:
        fp32 `[tokens]` and bool `[tokens]`, equal on every rank of tp.
    """
    rows = rows or _chunk_rows(x, shard)
    scores = x.new_empty(x.shape[0], dtype=torch.float32)  # [tokens]
    hits = torch.empty_like(scores, dtype=torch.bool)  # [tokens]
    for first in range(0, x.shape[0], rows):
        chunk = slice(first, first + rows)
        logits = (x[chunk] @ weight.t()).float()  # [rows, padded_size]
        logits[:, shard.size :] = -torch.inf
        local, elsewhere = _label_columns(labels[chunk], shard)  # [rows, 1], [rows]
        own, best = logits.max(dim=-1)  # [rows], [rows]: this rank's largest logit, and its column
        highest = all_reduce(own.clone(), tp, "max")  # [rows]
        # The lowest id among the ranks' most probable tokens, as a maximum of negatives. [rows]
        best = -all_reduce(-(best + shard.start).masked_fill(own < highest, shard.vocab_size), tp, "max")
        at_label = logits.gather(-1, local).squeeze(-1).sub_(highest).masked_fill_(elsewhere, 0.0)  # [rows]
        total = logits.sub_(highest.unsqueeze(-1)).exp_().sum(dim=-1)  # [rows]
        total, at_label = all_reduce(torch.stack([total, at_label]), tp)
        scores[chunk] = at_label - total.log()
        hits[chunk] = best == labels[chunk]
    return scores, hits
