"""The embedding table cut over the vocabulary (arXiv 1909.08053, section 3)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.mesh.mesh import Axis
from megatron.parallel.spec import ParameterSpec, Part, describe, param_spec
from megatron.parallel.tensor_parallel import TensorParallel


def padded_vocab_size(vocab_size: int, tp: int, divisible_by: int) -> int:
    """Return the smallest multiple of `divisible_by` * tp that is no less than `vocab_size`, Megatron-LM's rule.

    Args:
        vocab_size: number of token ids.
        tp: number of tensor-parallel ranks.
        divisible_by: --make-vocab-size-divisible-by.
    """
    step = divisible_by * tp
    return -(-vocab_size // step) * step


@dataclass(frozen=True)
class VocabShard:
    """The rows of a vocabulary that one rank holds.

    They are `padded_size` rows, of which the first `size` are the tokens `start` and on. The rest is padding: it makes all
    ranks' shares equal and well aligned for matrix units. Padding never takes part in a softmax, a checkpoint or a sample.

    Attributes:
        vocab_size: of the whole vocabulary, without padding.
    """

    vocab_size: int
    start: int
    padded_size: int
    size: int

    @classmethod
    def for_rank(cls, vocab_size: int, tp: Axis, divisible_by: int) -> VocabShard:
        """Return this rank's share; all ranks' shares of the padded vocabulary are equal.

        Args:
            vocab_size: number of token ids.
            tp: the tensor-parallel axis.
            divisible_by: each share's rows are a multiple of it.
        """
        padded_size = padded_vocab_size(vocab_size, tp.size, divisible_by) // tp.size
        start = tp.rank * padded_size
        # The last ranks of a small vocabulary may hold padding alone.
        return cls(vocab_size, min(start, vocab_size), padded_size, max(0, min(padded_size, vocab_size - start)))


def vocab_parameter(shard: VocabShard, hidden: int) -> nn.Parameter:
    """Return a `[padded_size, hidden]` matrix whose rows are tokens: the embedding, or an untied output layer."""
    part = Part((shard.start, 0), (shard.size, hidden))
    spec = ParameterSpec("", (shard.vocab_size, hidden), part, frozenset({"tp"}))
    return describe(nn.Parameter(torch.empty(shard.padded_size, hidden)), spec)


def vocab_bias(shard: VocabShard) -> nn.Parameter:
    """Return a bias `[padded_size]` of the output layer's logits."""
    spec = ParameterSpec(
        "", (shard.vocab_size,), Part((shard.start,), (shard.size,)), frozenset({"tp"}), decay=False, init="zeros"
    )
    return describe(nn.Parameter(torch.empty(shard.padded_size)), spec)


def describe_copy(weight: nn.Parameter) -> None:
    """Make one parameter of an embedding and a tied output layer that are far apart: their gradients are summed."""
    describe(weight, replace(param_spec(weight), name="embedding.word.weight", sum_grad_over=frozenset({"embedding"})))


class VocabEmbedding(nn.Module):
    """Token ids `[...]`, the same on every rank -> `[..., hidden]`, under sequence parallelism this rank's slice of them."""

    def __init__(self, shard: VocabShard, hidden: int, tp: TensorParallel) -> None:
        super().__init__()
        self.shard, self.tp = shard, tp
        self.weight = vocab_parameter(shard, hidden)

    def forward(self, tokens: Tensor) -> Tensor:
        """Look the tokens up. tokens: int64 `[...]`; under sequence parallelism the sequence is dimension 0."""
        if self.tp.size == 1:
            return F.embedding(tokens, self.weight)  # [..., hidden]
        # Each rank looks up its own tokens and has zeros for the others; the sum over the ranks is the whole.
        elsewhere = (tokens < self.shard.start) | (tokens >= self.shard.start + self.shard.size)  # [...]
        rows = F.embedding((tokens - self.shard.start).masked_fill(elsewhere, 0), self.weight)  # [..., hidden]
        own_rows = rows.masked_fill(elsewhere.unsqueeze(-1), 0.0)  # [..., hidden]
        return self.tp.leave(own_rows)  # [..., hidden], or this rank's slice of the sequence
