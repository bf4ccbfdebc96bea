"""Cross-entropy over a vocabulary that is cut over the tensor-parallel axis, without gathering the logits.

Three numbers per token are reduced instead (1909.08053): the maximum, the sum of exponentials, the label's logit.
Padding columns are left out, so the loss is that of the unpadded vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.mesh.mesh import Axis
from megatron.parallel.collectives import all_reduce
from megatron.parallel.embedding import VocabShard


class _VocabCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, shard: VocabShard, tp: Axis) -> Tensor:
        x = logits[:, : shard.used].float()  # [tokens, used]
        # A rank may hold padding alone.
        top = x.amax(dim=-1) if shard.used else x.new_full((x.shape[0],), -torch.inf)
        top = all_reduce(top, tp, "max")
        x = x - top.unsqueeze(-1)
        elsewhere = (labels < shard.start) | (labels >= shard.start + shard.used)
        local = (labels - shard.start).masked_fill(elsewhere, 0)
        if shard.used:
            at_label = x.gather(-1, local.unsqueeze(-1)).squeeze(-1).masked_fill(elsewhere, 0.0)
        else:
            at_label = torch.zeros_like(top)
        exps = x.exp_()
        sums = torch.stack([exps.sum(dim=-1), at_label])
        total, at_label = all_reduce(sums, tp)
        ctx.save_for_backward(exps.div_(total.unsqueeze(-1)), local, elsewhere)
        ctx.held, ctx.dtype = shard.held, logits.dtype
        loss: Tensor = total.log() - at_label
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        softmax, local, elsewhere = ctx.saved_tensors
        grad = grads[0].unsqueeze(-1)
        result = softmax.new_zeros(softmax.shape[0], ctx.held, dtype=ctx.dtype)
        used = result[:, : softmax.shape[1]]
        used.copy_(softmax * grad)
        if softmax.shape[1]:
            used.scatter_add_(-1, local.unsqueeze(-1), (-grad).masked_fill(elsewhere.unsqueeze(-1), 0.0).to(ctx.dtype))
        return result, None, None, None


def vocab_cross_entropy(logits: Tensor, labels: Tensor, shard: VocabShard, tp: Axis) -> Tensor:
    """Loss of each token, fp32 `[tokens]`.

    logits: `[tokens, held]`, this rank's columns. labels: int64 `[tokens]`, the same on all ranks, each in the
    vocabulary. At size 1 this is `torch.nn.functional.cross_entropy` of the true columns, bit for bit.
    """
    if tp.size == 1:
        return F.cross_entropy(logits[:, : shard.used].float(), labels, reduction="none")
    loss: Tensor = _VocabCrossEntropy.apply(logits, labels, shard, tp)  # type: ignore[no-untyped-call]
    return loss
