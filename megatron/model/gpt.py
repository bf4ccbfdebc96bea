"""GPT: a transformer whose tokens see what came before, and an output layer that says what follows, by default tied."""

from __future__ import annotations

from torch import Tensor, nn

from megatron.contract import Batch, Loss
from megatron.model.transformer import Transformer
from megatron.parallel.output import VocabOutput


class GPT(Transformer):
    """The part of a GPT that `part` names; arguments as for `Transformer`."""

    causal = True

    def build_heads(self, word: nn.Parameter | None) -> None:
        self.head = self.build_output(word)

    def loss(self, x: Tensor, batch: Batch) -> Loss:
        """Return the sum of the cross-entropies of the tokens that count."""
        return Loss(self.output.loss(x, batch.labels, batch.loss_mask), batch.loss_mask.sum())

    def logits(self, x: Tensor) -> Tensor:
        """Return from the final hidden states what follows each token, fp32 `[seq, batch, vocab]`, padding left out."""
        return self.output.logits(x)

    @property
    def output(self) -> VocabOutput:
        """The output layer. ValueError on a stage without it."""
        if self.head is None:
            raise ValueError("this stage has no output layer")
        return self.head
