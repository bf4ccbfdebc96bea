"""BERT: a transformer with bidirectional attention and the two heads of pretraining (arXiv 1909.08053, section 5.3).

As in GPT, each layer begins with a norm, and one follows the last layer. This is the order of the paper, which trains stably
where the original BERT's does not. Transformers calls the architecture MegatronBert. Two heads read the final hidden states:

    masked-word head  dense, GELU, norm, the embedding's matrix, a bias        predicts the masked tokens
    binary head       tanh of a dense layer on the first token, two classes    predicts whether the segments were swapped

Padding is a document of its own, so other tokens do not attend to it. Without the binary head there are no token types either.
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
    """A linear layer whose whole weight is on every tensor-parallel rank.

    It has no `flops`, because they are negligible: most of these layers act on one token of a sample or have few outputs.
    """

    def __init__(self, in_features: int, out_features: int, tp: TensorParallel) -> None:
        super().__init__()
        self.weight = tp.parameter(out_features, in_features, init="normal")
        self.bias = tp.parameter(out_features, init="zeros", decay=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., in_features]` to `[..., out_features]`."""
        return F.linear(x, self.weight, self.bias)  # [..., out_features]


class MaskedWordHead(nn.Module):
    """Transforms final hidden states into the output layer's input, both `[seq, batch, hidden]`; has that layer's bias."""

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
        """Map final hidden states `[seq, batch, hidden]` to the input of the output layer, of the same shape."""
        y: Tensor = self.norm(self.activation(self.dense(x)))  # [seq, batch, hidden]
        return y


class Pooler(Dense):
    """Maps final hidden states `[seq, batch, hidden]` to `[batch, hidden]`: the first token, which represents the sample."""

    def __init__(self, config: ModelConfig, tp: TensorParallel) -> None:
        super().__init__(config.hidden_size, config.hidden_size, tp.on_whole_sequences)
        self.join = tp.join

    def forward(self, x: Tensor) -> Tensor:
        """Return tanh of the dense layer on the first token, `[batch, hidden]`."""
        # Under sequence parallelism each rank contributes its slice's first token; the first of these is the sequence's.
        first = self.join(x[:1])[0]  # [batch, hidden]
        return torch.tanh(super().forward(first))  # [batch, hidden]


class Bert(Transformer):
    """The part of a BERT that `part` describes; the arguments are those of `Transformer`."""

    causal = False

    def build_heads(self, word: nn.Parameter | None) -> None:
        """Add output layer, masked-word head, pooler and binary head, if `part.head` and the configuration has them."""
        config, tp, is_last = self.config, self.tp, self.part.head
        self.head = self.build_output(word)
        self.masked_words = MaskedWordHead(config, self.vocabulary, tp) if is_last and config.has_output_layer else None
        self.pooler = Pooler(config, tp) if is_last and config.has_pooler else None
        has_order = is_last and config.has_binary_head
        self.order = Dense(config.hidden_size, 2, tp.on_whole_sequences) if has_order else None

    def loss(self, x: Tensor, batch: Batch) -> Loss:
        """Return the loss of the masked words; with the binary head also that of the order, if `batch.swapped` is given.

        Args:
            x: final hidden states `[seq, batch, hidden]`.
            batch: the micro-batch, with its labels.
        """
        output, words = self._output()
        total = output.loss(words(x), batch.labels, batch.loss_mask, words.bias)  # scalar
        order = None
        if self.order is not None and batch.swapped is not None:
            order = F.cross_entropy(self.order_logits(x), batch.swapped, reduction="sum")  # scalar
            if batch.places is not None:  # under context parallelism only the rank with the first token counts the loss
                order = order * (batch.places[0] == 0)
        return Loss(total, batch.loss_mask.sum(), order)

    def logits(self, x: Tensor) -> Tensor:
        """Return the masked-word logits of the final hidden states, fp32 `[seq, batch, vocab]`, without vocabulary padding."""
        output, words = self._output()
        return output.logits(words(x), words.bias)  # [seq, batch, vocab]

    def order_logits(self, x: Tensor) -> Tensor:
        """Return the binary head's logits of the final hidden states, fp32 `[batch, 2]`: in order, swapped."""
        if self.order is None or self.pooler is None:
            raise ValueError("this BERT has no binary head (--bert-no-binary-head), or this stage is not the last")
        logits: Tensor = self.order(self.pooler(x))  # [batch, 2]
        return logits.float()

    def _output(self) -> tuple[VocabOutput, MaskedWordHead]:
        if self.head is None or self.masked_words is None:
            raise ValueError("this stage has no output layer")
        return self.head, self.masked_words
