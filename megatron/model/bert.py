"""BERT: a transformer with attention in both directions, and the heads of pretraining (arXiv 1909.08053, section 5.3).

Layer norms come first in each layer, and one follows the last, as in GPT: the paper's order, which trains stably where the
original BERT's does not. Transformers calls the architecture MegatronBert. Two heads read the final hidden states:

    masked words      dense, GELU, norm, the embedding's matrix, a bias        what the masked tokens were
    binary head       tanh of a dense layer on the first token, two classes    whether the two segments were swapped

Padding is a document of its own, so no true token sees it. Without the binary head there are no token types either.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.config.schema import ModelConfig
from megatron.contract import Batch, Loss
from megatron.model.mlp import ACTIVATIONS
from megatron.model.norm import make_norm
from megatron.model.transformer import Transformer
from megatron.parallel.cost import Flops, weight_flops
from megatron.parallel.embedding import VocabShard, vocab_bias
from megatron.parallel.output import VocabOutput
from megatron.parallel.tensor_parallel import TensorParallel


class Dense(nn.Module):
    """A linear layer that is not cut, for hidden states as layers hand them on.

    It says nothing of FLOPs: most are for one token of a sample, or have a few outputs.
    """

    def __init__(self, in_features: int, out_features: int, tp: TensorParallel) -> None:
        super().__init__()
        self.weight = tp.parameter(out_features, in_features, init="normal")
        self.bias = tp.parameter(out_features, init="zeros", decay=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., in_features]` to `[..., out_features]`."""
        return F.linear(x, self.weight, self.bias)


class MaskedWordHead(nn.Module):
    """Final hidden states -> what the output layer multiplies, both `[seq, batch, hidden]`; and the output layer's bias."""

    def __init__(self, config: ModelConfig, vocabulary: VocabShard, tp: TensorParallel) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.dense = Dense(hidden, hidden, tp)
        self.norm = make_norm(config, tp)
        self.activation = ACTIVATIONS[config.activation]
        self.bias = vocab_bias(vocabulary)

    def flops(self, seq: int) -> Flops:
        """Return the FLOPs of one token's dense layer."""
        return weight_flops(self.dense.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Transform final hidden states for the output layer."""
        y: Tensor = self.norm(self.activation(self.dense(x)))  # [seq, batch, hidden]
        return y


class Pooler(Dense):
    """Final hidden states `[seq, batch, hidden]` -> `[batch, hidden]` from the first token, which stands for the sample."""

    def __init__(self, config: ModelConfig, tp: TensorParallel) -> None:
        super().__init__(config.hidden_size, config.hidden_size, tp.on_whole_sequences)
        self.join = tp.join

    def forward(self, x: Tensor) -> Tensor:
        """Return tanh of the dense layer on the first token."""
        # Where the sequence is cut, each process joins its own first token; the first of those is the sequence's.
        first = self.join(x[:1])[0]  # [batch, hidden]
        return torch.tanh(super().forward(first))  # [batch, hidden]


class Bert(Transformer):
    """The part of a BERT that `part` names; arguments as for `Transformer`."""

    causal = False

    def build_heads(self, word: nn.Parameter | None) -> None:
        """Add output layer, masked-word head, pooler and binary head, where `part.head` and the configuration has them."""
        config, tp, here = self.config, self.tp, self.part.head
        self.head = self.build_output(word)
        self.masked_words = MaskedWordHead(config, self.vocabulary, tp) if here and config.has_output_layer else None
        self.pooler = Pooler(config, tp) if here and config.has_pooler else None
        swapped = here and config.has_binary_head
        self.order = Dense(config.hidden_size, 2, tp.on_whole_sequences) if swapped else None

    def loss(self, x: Tensor, batch: Batch) -> Loss:
        """Return the loss of the masked words; with the binary head also of the order, for batches that say what it was.

        x: final hidden states `[seq, batch, hidden]`.
        """
        output, words = self._output()
        total = output.loss(words(x), batch.labels, batch.loss_mask, words.bias)
        order = None
        if self.order is not None and batch.swapped is not None:
            order = F.cross_entropy(self.order_logits(x), batch.swapped, reduction="sum")  # scalar
            if batch.places is not None:  # of a cut sequence, one process has the first token
                order = order * (batch.places[0] == 0)
        return Loss(total, batch.loss_mask.sum(), order)

    def logits(self, x: Tensor) -> Tensor:
        """Return from the final hidden states the masked words' logits, fp32 `[seq, batch, vocab]`, padding left out."""
        output, words = self._output()
        return output.logits(words(x), words.bias)

    def order_logits(self, x: Tensor) -> Tensor:
        """Return from the final hidden states fp32 `[batch, 2]`: in order, swapped."""
        if self.order is None or self.pooler is None:
            raise ValueError("this BERT has no binary head (--bert-no-binary-head), or this stage is not the last")
        logits: Tensor = self.order(self.pooler(x))  # [batch, 2]
        return logits.float()

    def _output(self) -> tuple[VocabOutput, MaskedWordHead]:
        if self.head is None or self.masked_words is None:
            raise ValueError("this stage has no output layer")
        return self.head, self.masked_words
