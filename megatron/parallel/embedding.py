"""Embedding tables whose rows are divided over the tensor-parallel ranks (arXiv 1909.08053, section 3)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.mesh.mesh import Axis
from megatron.parallel.spec import ParameterSpec, Part, describe, param_spec
from megatron.parallel.tensor_parallel import TensorParallel


def padded_vocab_size(vocab_size: int, tp: int, divisible_by: int) -> int:
    """Return the smallest multiple of `divisible_by` * `tp` that is at least `vocab_size`, as Megatron-LM does.

    Args:
        vocab_size: number of token ids.
        tp: number of tensor-parallel ranks.
        divisible_by: --make-vocab-size-divisible-by.
    """
    step = divisible_by * tp
    return -(-vocab_size // step) * step


@dataclass(frozen=True)
class VocabShard:
    """The rows of a vocabulary on one rank.

    The rows after the first `size` are padding, which makes the shards of all ranks equally long and aligned for matrix units.
    Padding is excluded from every softmax, checkpoint and sampled token.

    Attributes:
        vocab_size: number of tokens of the whole vocabulary, without padding.
        start: token id of the first row.
        padded_size: number of rows, including padding.
        size: number of rows that are tokens.
    """

    vocab_size: int
    start: int
    padded_size: int
    size: int

    @classmethod
    def for_rank(cls, vocab_size: int, tp: Axis, divisible_by: int) -> VocabShard:
        """Return this rank's rows of the padded vocabulary, of which every rank has the same number.

        Args:
            vocab_size: number of token ids.
            tp: the tensor-parallel axis.
            divisible_by: number of which each rank's rows are a multiple.
        """
        padded_size = padded_vocab_size(vocab_size, tp.size, divisible_by) // tp.size
        start = tp.rank * padded_size
        # With a small vocabulary, all rows of the last ranks may be padding.
        return cls(vocab_size, min(start, vocab_size), padded_size, max(0, min(padded_size, vocab_size - start)))


def vocab_parameter(shard: VocabShard, hidden: int) -> nn.Parameter:
    """Return a `[padded_size, hidden]` matrix with a row for each token, for the embedding or an untied output layer."""
    part = Part((shard.start, 0), (shard.size, hidden))
    spec = ParameterSpec("", (shard.vocab_size, hidden), part, frozenset({"tp"}))
    return describe(nn.Parameter(torch.empty(shard.padded_size, hidden)), spec)


def vocab_bias(shard: VocabShard) -> nn.Parameter:
    """Return a bias `[padded_size]` for the logits of the output layer."""
    spec = ParameterSpec(
        "", (shard.vocab_size,), Part((shard.start,), (shard.size,)), frozenset({"tp"}), decay=False, init="zeros"
    )
    return describe(nn.Parameter(torch.empty(shard.padded_size)), spec)


def describe_copy(weight: nn.Parameter) -> None:
    """Mark `weight` as one of two copies of the embedding's weight, on the stages of the embedding and of a tied output layer.

    Both copies get the same global name, and their gradients are summed.
    """
    describe(weight, replace(param_spec(weight), name="embedding.word.weight", sum_grad_over=frozenset({"embedding"})))


class VocabEmbedding(nn.Module):
    """Embedding, `[...] -> [..., hidden]`, of tokens that are the same on every rank.

    Under sequence parallelism the result is this rank's slice of the sequence.
    """

    def __init__(self, shard: VocabShard, hidden: int, tp: TensorParallel) -> None:
        super().__init__()
        self.shard, self.tp = shard, tp
        self.weight = vocab_parameter(shard, hidden)

    def forward(self, tokens: Tensor) -> Tensor:
        """Look up the tokens. tokens: int64 `[...]`; under sequence parallelism the sequence is dimension 0."""
        if self.tp.size == 1:
            return F.embedding(tokens, self.weight)  # [..., hidden]
        # Each rank looks up the tokens of its own rows and has zeros for the others; the sum over the ranks is the result.
        elsewhere = (tokens < self.shard.start) | (tokens >= self.shard.start + self.shard.size)  # [...]
        rows = F.embedding((tokens - self.shard.start).masked_fill(elsewhere, 0), self.weight)  # [..., hidden]
        own_rows = rows.masked_fill(elsewhere.unsqueeze(-1), 0.0)  # [..., hidden]
        return self.tp.leave(own_rows)  # [..., hidden], or this rank's slice of the sequence
