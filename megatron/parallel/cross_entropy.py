"""The output layer and its cross-entropy in one, over a vocabulary that may be cut over the tensor-parallel axis.

Logits are the largest activation of a language model, and only the loss wants them. So a few tokens at a time their
logits are computed, turned into losses and at once into gradients, and forgotten: the memory is that of one chunk, which
on a CPU stays in its cache. Over a cut vocabulary three numbers a token are reduced instead of gathering the logits
(1909.08053): the maximum, the sum of exponentials, the label's logit. Padding rows get the logit minus infinity, so the
loss is that of the unpadded vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron.mesh.mesh import Axis
from megatron.parallel.collectives import all_reduce
from megatron.parallel.embedding import VocabShard

# Logits of one chunk: what stays in a CPU's cache (16 MB in fp32), and enough rows to fill a GPU (0.5 GB).
CHUNK = {"cpu": 1 << 22, "cuda": 1 << 27}
MOST_FP16_ROWS = 4096  # with hidden states of up to 16, no sum over a chunk passes 65504, where fp16 ends
FEWEST_ROWS = 256  # below this the weight's gradient is read and written more often than it is worth


def token_losses(logits: Tensor, labels: Tensor, shard: VocabShard, tp: Axis) -> tuple[Tensor, Tensor]:
    """Losses fp32 `[tokens]`, and their gradients by the logits, fp32 `[tokens, held]`.

    logits: `[tokens, held]`, this rank's columns; overwritten. labels: int64 `[tokens]`, the same on every rank.
    """
    logits[:, shard.used :] = -torch.inf
    x = logits.float()
    local, elsewhere = _columns(labels, shard)
    if tp.size == 1:
        x = x.log_softmax(dim=-1)
        losses, probabilities = -x.gather(-1, local).squeeze(-1), x.exp_()
    else:
        x = x - all_reduce(x.amax(dim=-1), tp, "max").unsqueeze(-1)
        at_label = x.gather(-1, local).squeeze(-1).masked_fill(elsewhere, 0.0)
        exponentials = x.exp_()
        total, at_label = all_reduce(torch.stack([exponentials.sum(dim=-1), at_label]), tp)
        losses, probabilities = total.log() - at_label, exponentials.div_(total.unsqueeze(-1))
    probabilities.scatter_add_(-1, local, elsewhere.to(x.dtype).unsqueeze(-1) - 1.0)
    return losses, probabilities


def _columns(labels: Tensor, shard: VocabShard) -> tuple[Tensor, Tensor]:
    """Where the labels are among this rank's columns, int64 `[tokens, 1]`; bool `[tokens]`, true where on another rank."""
    elsewhere = (labels < shard.start) | (labels >= shard.start + shard.used)
    return (labels - shard.start).masked_fill(elsewhere, 0).unsqueeze(-1), elsewhere


def _chunk_rows(x: Tensor, shard: VocabShard) -> int:
    """Tokens whose logits are held at a time; the same on every rank of tp."""
    return max(FEWEST_ROWS, CHUNK.get(x.device.type, CHUNK["cpu"]) // shard.held)


def head_loss_bytes(tokens: int, hidden: int, held: int, element: int) -> int:
    """Return what `head_loss` holds at its fullest on a GPU; on a CPU, whose chunks are smaller, at most.

    There are the input and its gradient, tokens x hidden each; the weight's gradient, held x hidden in fp32, and a product or
    a copy of it in the compute dtype; and of one chunk the logits, in 16 bit also their fp32 copy, and the fp32 probabilities.

    Args:
        tokens: of all samples at hand.
        hidden: width of the hidden states.
        held: rows of the vocabulary on this rank.
        element: bytes of a number in the compute dtype.
    """
    rows = min(tokens, max(FEWEST_ROWS, max(CHUNK.values()) // held))
    chunk = rows * held * (element + (4 if element < 4 else 0) + 4)
    return 2 * element * tokens * hidden + (4 + element) * held * hidden + chunk


class _HeadLoss(torch.autograd.Function):
    """Gradients are made along with the loss: that of the sum is each token's own, times what comes from above."""

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
        wanted: bool,
    ) -> Tensor:
        total = x.new_zeros((), dtype=torch.float32)
        grad_x = torch.empty_like(x) if wanted else None
        grad_weight = torch.empty_like(weight, dtype=torch.float32) if wanted else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if wanted and bias is not None else None
        room = x.new_empty(min(rows, x.shape[0]), shard.held)
        for first in range(0, x.shape[0], rows):
            chunk = slice(first, first + rows)
            logits = torch.mm(x[chunk], weight.t(), out=room[: x.shape[0] - first])
            if bias is not None:
                logits += bias
            losses, grads = token_losses(logits, labels[chunk], shard, tp)
            total += losses @ mask[chunk]
            if grad_bias is not None:
                grad_bias += mask[chunk] @ grads
            if grad_x is not None and grad_weight is not None:
                # The mask's rows go to the narrow factors, which are much smaller than the logits' gradients.
                grads, counts = grads.to(x.dtype), mask[chunk].unsqueeze(-1).to(x.dtype)
                torch.mm(grads, weight, out=grad_x[chunk]).mul_(counts)
                counted = x[chunk] * counts
                if first == 0:
                    grad_weight.copy_(grads.t() @ counted)
                elif x.dtype == torch.float32:
                    grad_weight.addmm_(grads.t(), counted)
                else:  # the chunks' sum in fp32, their products in the compute dtype
                    grad_weight += grads.t() @ counted
        if grad_x is not None and grad_weight is not None:
            ctx.save_for_backward(grad_x, grad_weight, grad_bias)
            ctx.dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor | None, ...]:
        # In place, since nobody else has them; autograd itself refuses a second backward over changed tensors.
        grad_x, grad_weight, grad_bias = ctx.saved_tensors
        # A loss scale above 65504 is no fp16 number, though its product with a gradient can be one.
        grad_x = (grad_x.float() * above[0]).to(grad_x.dtype) if grad_x.dtype == torch.float16 else grad_x.mul_(above[0])
        grad_bias = None if grad_bias is None else grad_bias.mul_(above[0]).to(ctx.dtype)
        return grad_x, grad_weight.mul_(above[0]).to(ctx.dtype), grad_bias, *[None] * 6


def head_loss(
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
    """Sum over tokens of mask x cross-entropy of the logits `x weight^T + bias`; fp32 scalar, equal on every rank of tp.

    x: `[tokens, hidden]`, whole on every rank; the gradient it gets is this rank's part of a sum over tp. weight:
    `[held, hidden]`, this rank's rows. bias: `[held]`. labels: int64 `[tokens]` within the vocabulary. mask: fp32 `[tokens]`.
    rows: tokens of a chunk, the same on every rank; default what suits the device.
    """
    rows = rows or _chunk_rows(x, shard)
    if x.dtype == torch.float16:
        rows = min(rows, MOST_FP16_ROWS)
    wanted = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    loss: Tensor = _HeadLoss.apply(x, weight, bias, labels, mask, shard, tp, rows, wanted)  # type: ignore[no-untyped-call]
    return loss


@torch.no_grad()
def label_scores(
    x: Tensor, weight: Tensor, labels: Tensor, shard: VocabShard, tp: Axis, rows: int | None = None
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the labels, fp32 `[tokens]`, and whether each is the most probable token, bool `[tokens]`.

    Equal on every rank of tp; arguments as of `head_loss`. Of equally probable tokens the lower one counts as the more
    probable, as in generation.
    """
    rows = rows or _chunk_rows(x, shard)
    scores = x.new_empty(x.shape[0], dtype=torch.float32)
    hits = torch.empty_like(scores, dtype=torch.bool)
    for first in range(0, x.shape[0], rows):
        chunk = slice(first, first + rows)
        logits = (x[chunk] @ weight.t()).float()
        logits[:, shard.used :] = -torch.inf
        local, elsewhere = _columns(labels[chunk], shard)
        own, best = logits.max(dim=-1)
        highest = all_reduce(own.clone(), tp, "max")
        # The lowest of the ranks' most probable tokens, as the largest of their negatives.
        best = -all_reduce(-(best + shard.start).masked_fill(own < highest, shard.vocab), tp, "max")
        at_label = logits.gather(-1, local).squeeze(-1).sub_(highest).masked_fill_(elsewhere, 0.0)
        total = logits.sub_(highest.unsqueeze(-1)).exp_().sum(dim=-1)
        total, at_label = all_reduce(torch.stack([total, at_label]), tp)
        scores[chunk] = at_label - total.log()
        hits[chunk] = best == labels[chunk]
    return scores, hits
