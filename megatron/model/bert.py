"""BERT: GPT's embedding and layers with attention in both directions, and other heads (arXiv 1909.08053, section 5.3).

Layer norms come first in each layer, and one follows the last, as in GPT: the paper's order, which trains stably where the
original BERT's does not. Transformers calls the architecture MegatronBert. Two heads read the final hidden states:

    masked words      dense, GELU, norm, the embedding's matrix, a bias        what the masked tokens were
    binary head       tanh of a dense layer on the first token, two classes    whether the two segments were swapped

Padding is a document of its own, so no true token sees it. Without the binary head there are no token types either.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.config.schema import ModelConfig
from megatron.contract import Batch, Loss, StagePart
from megatron.model.attention import Attend, bidirectional_attention
from megatron.model.gpt import GPT
from megatron.model.mlp import ACTIVATIONS
from megatron.model.norm import Norm
from megatron.parallel.embedding import VocabShard, vocab_bias
from megatron.parallel.spec import name_parameters
from megatron.parallel.tensor_parallel import TensorParallel


class Dense(nn.Module):
    """A linear layer that every tensor-parallel rank holds whole, for hidden states as layers hand them on."""

    def __init__(self, in_features: int, out_features: int, tp: TensorParallel) -> None:
        super().__init__()
        self.weight = tp.parameter(out_features, in_features, init="normal")
        self.bias = tp.parameter(out_features, init="zeros", decay=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class MaskedWordHead(nn.Module):
    """Final hidden states -> what the output layer multiplies, both `[seq, batch, hidden]`; and the output layer's bias."""

    def __init__(self, config: ModelConfig, shard: VocabShard, tp: TensorParallel) -> None:
        super().__init__()
        hidden = config.size("hidden_size")
        self.dense = Dense(hidden, hidden, tp)
        self.norm = Norm(config, tp)
        self.activation = ACTIVATIONS[config.activation]
        self.bias = vocab_bias(shard)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.activation(self.dense(x)))
        return y


class Bert(GPT):
    """The part of a BERT that `part` names; arguments as for `GPT`, attention in both directions unless given."""

    def __init__(
        self,
        config: ModelConfig,
        part: StagePart,
        tp: TensorParallel,
        *,
        attend: Attend = bidirectional_attention,
        **options: Any,
    ) -> None:
        super().__init__(config, part, tp, attend=attend, **options)
        hidden = config.size("hidden_size")
        self.masked_words: MaskedWordHead | None = None
        self.pooler: Dense | None = None
        self.order: Dense | None = None
        with torch.device(self.device):
            if part.head and config.predicts_words:
                self.masked_words = MaskedWordHead(config, self.shard, tp)
            if part.head and config.pooled:
                self.pooler = Dense(hidden, hidden, tp.on_whole_sequences)
            if part.head and config.predicts_order:
                self.order = Dense(hidden, 2, tp.on_whole_sequences)
            self._add_heads()
        self.to(self.dtype)
        name_parameters(self)

    def _add_heads(self) -> None:
        """Modules of a derived class, on the device at hand."""

    def loss(self, x: Tensor, batch: Batch) -> Loss:
        """Of the masked words; with the binary head also of the order, for batches that say what it was."""
        words = self._masked_words()
        total = self._head().loss(words(x), batch.labels, batch.loss_mask, words.bias)
        order = None
        if self.order is not None and batch.swapped is not None:
            order = F.cross_entropy(self.order_logits(x), batch.swapped, reduction="sum")
            if batch.places is not None:  # of a cut sequence, one rank has the first token
                order = order * (batch.places[0] == 0)
        return Loss(total, batch.loss_mask.sum(), order)

    def output(self, x: Tensor) -> Tensor:
        """Final hidden states to the masked words' logits, fp32 `[seq, batch, vocab]` on every tensor-parallel rank."""
        words = self._masked_words()
        return self._head().logits(words(x), words.bias)

    def pooled(self, x: Tensor) -> Tensor:
        """Final hidden states to `[batch, hidden]`, which stands for the whole sample; equal on every tensor-parallel rank."""
        if self.pooler is None:
            raise ValueError("this BERT has no pooler (--bert-no-binary-head), or this stage is not the last")
        return torch.tanh(self.pooler(self.tp.join(x[:1])[0]))

    def order_logits(self, x: Tensor) -> Tensor:
        """Final hidden states to fp32 `[batch, 2]`: in order, swapped."""
        if self.order is None:
            raise ValueError("this BERT has no binary head (--bert-no-binary-head), or this stage is not the last")
        logits: Tensor = self.order(self.pooled(x))
        return logits.float()

    def _masked_words(self) -> MaskedWordHead:
        if self.masked_words is None:
            raise ValueError("this stage has no output layer")
        return self.masked_words

    def _allowed(self, batch: Batch) -> Tensor | None:
        """Within documents, bool `[batch, 1, seq, seq]`; None where all may see all, or where the keys are on several ranks."""
        if batch.documents is None or batch.places is not None:
            return None
        return (batch.documents.unsqueeze(2) == batch.documents.unsqueeze(1)).unsqueeze(1)
