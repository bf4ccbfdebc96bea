"""GPT: a causal transformer with an output layer over the vocabulary, by default tied to the embedding."""

from __future__ import annotations

from torch import Tensor, nn

from megatron.contract import Batch, Loss
from megatron.model.transformer import Transformer
from megatron.parallel.output import VocabOutput


class GPT(Transformer):
    """The part of a GPT that `part` describes; the arguments are those of `Transformer`."""

    causal = True

    def build_heads(self, word: nn.Parameter | None) -> None:
        """Add the output layer if `part.head`."""
        self.head = self.build_output(word)

    def loss(self, x: Tensor, batch: Batch) -> Loss:
        """Return the sum of the unmasked tokens' cross-entropies, and the number of these tokens. x: `[seq, batch, hidden]`."""
        return Loss(self.output.loss(x, batch.labels, batch.loss_mask), batch.loss_mask.sum())

    def logits(self, x: Tensor) -> Tensor:
        """Return next-token logits of final hidden states, fp32 `[seq, batch, vocab]`, without vocabulary padding."""
        return self.output.logits(x)  # [seq, batch, vocab]

    @property
    def output(self) -> VocabOutput:
        """The output layer. ValueError on a stage without it."""
        if self.head is None:
            raise ValueError("this stage has no output layer")
        return self.head
