"""The embedding table cut over the vocabulary (arXiv 1909.08053, section 3)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.mesh.mesh import Axis
from megatron.parallel.spec import ParamSpec, Part, describe, spec_of
from megatron.parallel.tensor_parallel import TensorParallel


def padded_vocabulary(vocab: int, tp: int, divisible_by: int) -> int:
    """Return the smallest multiple of `divisible_by` x tp that holds `vocab` tokens, Megatron-LM's rule."""
    step = divisible_by * tp
    return -(-vocab // step) * step


@dataclass(frozen=True)
class VocabShard:
    """The rows of a vocabulary that one rank holds: `held` rows of which the first `used` are true tokens.

    The rest is padding: it makes all ranks' shares equal and well aligned for matrix units. Padding never takes part in
    a softmax, a checkpoint or a sample.
    """

    vocab: int
    start: int
    held: int
    used: int

    @classmethod
    def of(cls, vocab: int, tp: Axis, divisible_by: int) -> VocabShard:
        """Each rank holds an equal share of the padded vocabulary."""
        held = padded_vocabulary(vocab, tp.size, divisible_by) // tp.size
        start = tp.rank * held
        return cls(vocab, min(start, vocab), held, max(0, min(held, vocab - start)))


def vocab_parameter(shard: VocabShard, hidden: int) -> nn.Parameter:
    """A `[held, hidden]` matrix whose rows are tokens: the embedding, or an untied output layer."""
    part = Part((shard.start, 0), (shard.used, hidden))
    spec = ParamSpec("", (shard.vocab, hidden), part, frozenset({"tp"}))
    return describe(nn.Parameter(torch.empty(shard.held, hidden)), spec)


def vocab_bias(shard: VocabShard) -> nn.Parameter:
    """A bias `[held]` of the output layer's logits."""
    spec = ParamSpec("", (shard.vocab,), Part((shard.start,), (shard.used,)), frozenset({"tp"}), decay=False, init="zeros")
    return describe(nn.Parameter(torch.empty(shard.held)), spec)


def describe_copy(weight: nn.Parameter) -> None:
    """Make one parameter of an embedding and a tied output layer that are far apart: their gradients are summed."""
    describe(weight, replace(spec_of(weight), name="embedding.word.weight", sum_grad_over=frozenset({"embedding"})))


class VocabEmbedding(nn.Module):
    """Token ids `[...]`, the same on every rank -> `[..., hidden]`, under sequence parallelism this rank's slice of them."""

    def __init__(self, shard: VocabShard, hidden: int, tp: TensorParallel) -> None:
        super().__init__()
        self.shard, self.tp = shard, tp
        self.weight = vocab_parameter(shard, hidden)

    def forward(self, tokens: Tensor) -> Tensor:
        if self.tp.size == 1:
            return F.embedding(tokens, self.weight)
        elsewhere = (tokens < self.shard.start) | (tokens >= self.shard.start + self.shard.used)
        rows = F.embedding((tokens - self.shard.start).masked_fill(elsewhere, 0), self.weight)
        mine = rows.masked_fill(elsewhere.unsqueeze(-1), 0.0)
        return self.tp.leave(mine)
