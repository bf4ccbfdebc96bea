"""The output layer: the product of final hidden states with a vocabulary matrix, whose rows may be divided over ranks.

Its methods take hidden states as the last layer returns them, and return the whole result on every tensor-parallel rank.
"""

from __future__ import annotations

from torch import Tensor, nn

from megatron.parallel.collectives import gather_from
from megatron.parallel.cost import ActivationBytes, Flops, MicroBatchShape, weight_flops
from megatron.parallel.cross_entropy import fused_linear_cross_entropy, fused_linear_cross_entropy_bytes, label_scores
from megatron.parallel.embedding import VocabShard, vocab_parameter
from megatron.parallel.linear import column_products
from megatron.parallel.tensor_parallel import TensorParallel


class VocabOutput(nn.Module):
    """Computes loss, logits and label scores of hidden states `[seq, batch, hidden]`.

    Under sequence parallelism, the hidden states are this rank's slice of the sequence.

    Args:
        shard: this rank's rows of the vocabulary.
        hidden: width of the hidden states.
        tp: the tensor-parallel ranks.
        tied: the embedding's weight, `[padded_size, hidden]`, for a tied output layer. It is not a parameter of this module.
    """

    def __init__(self, shard: VocabShard, hidden: int, tp: TensorParallel, *, tied: nn.Parameter | None = None) -> None:
        super().__init__()
        self.shard, self.tp = shard, tp
        self.weight = vocab_parameter(shard, hidden) if tied is None else None
        self._tied = (tied,)  # in a tuple, so that it stays the embedding's parameter

    @property
    def matrix(self) -> nn.Parameter:
        """This rank's rows of the weight, `[padded_size, hidden]`: the layer's own, or the embedding's if it is tied."""
        matrix = self._tied[0] if self.weight is None else self.weight
        if matrix is None:
            raise ValueError("the output layer has no matrix: neither its own nor the embedding's")
        return matrix

    def flops(self, seq: int) -> Flops:
        """Return the FLOPs of one token's logits."""
        return weight_flops(self.matrix)

    def activation_bytes(self, shape: MicroBatchShape) -> ActivationBytes:
        """Return the transient bytes of the loss; only gradients are saved for the backward pass."""
        rows = self.shard.padded_size
        return ActivationBytes(transient=fused_linear_cross_entropy_bytes(shape.tokens, shape.hidden, rows, shape.element))

    def loss(self, x: Tensor, labels: Tensor, mask: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return the sum of the unmasked cross-entropies, fp32 scalar; see `fused_linear_cross_entropy`.

        Args:
            x: hidden states `[seq, batch, hidden]`; under sequence parallelism, this rank's slice of the sequence.
            labels: int64 `[batch, seq]`.
            mask: fp32 `[batch, seq]`, 1 where a label counts.
            bias: `[padded_size]`, this rank's part of the logits' bias, or None.
        """
        labels, mask = labels.t().reshape(-1), mask.t().reshape(-1)  # [seq * batch]
        whole = self.tp.enter(x).flatten(0, 1)  # [seq * batch, hidden]
        return fused_linear_cross_entropy(whole, self.matrix, labels, mask, self.shard, self.tp.axis, bias=bias)

    def logits(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return logits, fp32 `[seq, batch, vocab]`, without padding. bias: `[padded_size]`, this rank's part."""
        columns = column_products(x, self.tp, [self.matrix], [bias])[0]  # [seq, batch, padded_size]
        # The padding is at the end of the whole vocabulary, so it is cut off after the gather.
        return gather_from(columns, self.tp.axis, -1)[..., : self.shard.vocab_size].float()  # [seq, batch, vocab]

    def label_scores(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the labels' log-probabilities, fp32 `[seq, batch]`, and whether each is the most probable token, bool.

        The logits are computed in chunks of tokens. labels: int64 `[batch, seq]`.
        """
        labels = labels.t()  # [seq, batch]
        whole = self.tp.join(x).flatten(0, 1)  # [seq * batch, hidden]
        # Each [seq * batch].
        scores, hits = label_scores(whole, self.matrix, labels.reshape(-1), self.shard, self.tp.axis)
        return scores.view(labels.shape), hits.view(labels.shape)
