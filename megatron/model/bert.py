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
from megatron.mesh.mesh import Axis
from megatron.model.attention import Attend, bidirectional_attention
from megatron.model.gpt import GPT
from megatron.model.mlp import ACTIVATIONS
from megatron.model.norm import Norm
from megatron.parallel.collectives import copy_to, gather_from, gather_sum
from megatron.parallel.cross_entropy import head_loss
from megatron.parallel.embedding import VocabShard
from megatron.parallel.linear import column_products, replicated
from megatron.parallel.spec import ParamSpec, Part, describe, name_parameters


class Dense(nn.Module):
    """A linear layer that every tensor-parallel rank holds whole. sequence_parallel: each sees its slice of the sequence."""

    def __init__(self, in_features: int, out_features: int, *, sequence_parallel: bool = False) -> None:
        super().__init__()
        spec = replicated((out_features, in_features), sequence_parallel, decay=True, init="normal")
        self.weight = describe(nn.Parameter(torch.empty(out_features, in_features)), spec)
        spec = replicated((out_features,), sequence_parallel, decay=False, init="zeros")
        self.bias = describe(nn.Parameter(torch.empty(out_features)), spec)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class MaskedWordHead(nn.Module):
    """Final hidden states -> what the output layer multiplies, both `[seq, batch, hidden]`; and the output layer's bias.

    Under sequence parallelism this is done on each rank's slice of the sequence.
    """

    def __init__(self, config: ModelConfig, shard: VocabShard, *, sequence_parallel: bool) -> None:
        super().__init__()
        hidden = config.size("hidden_size")
        self.dense = Dense(hidden, hidden, sequence_parallel=sequence_parallel)
        self.norm = Norm(config, sequence_parallel=sequence_parallel)
        self.activation = ACTIVATIONS[config.activation]
        part = Part((shard.start,), (shard.used,))
        spec = ParamSpec("", (shard.vocab,), part, frozenset({"tp"}), decay=False, init="zeros")
        self.bias = describe(nn.Parameter(torch.empty(shard.held)), spec)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.activation(self.dense(x)))
        return y


class Bert(GPT):
    """The part of a BERT that `part` names; arguments as for `GPT`, attention in both directions unless given."""

    def __init__(
        self, config: ModelConfig, part: StagePart, tp: Axis, *, attend: Attend = bidirectional_attention, **options: Any
    ) -> None:
        super().__init__(config, part, tp, attend=attend, **options)
        hidden = config.size("hidden_size")
        self.masked_words: MaskedWordHead | None = None
        self.pooler: Dense | None = None
        self.order: Dense | None = None
        with torch.device(self.device):
            if part.head and config.predicts_words:
                self.masked_words = MaskedWordHead(config, self.shard, sequence_parallel=self.sequence_parallel)
            if part.head and config.pooled:
                self.pooler = Dense(hidden, hidden)
            if part.head and config.predicts_order:
                self.order = Dense(hidden, 2)
            self._add_heads()
        self.to(self.dtype)
        name_parameters(self)

    def _add_heads(self) -> None:
        """Modules of a derived class, on the device at hand."""

    def loss(self, x: Tensor, batch: Batch) -> Loss:
        """Of the masked words; with the binary head also of the order, for batches that say what it was."""
        labels, mask = batch.labels.t().reshape(-1), batch.loss_mask.t().reshape(-1)
        words = self._words(x)
        words = gather_sum(words, self.tp, 0) if self.sequence_parallel else copy_to(words, self.tp)
        total = head_loss(words.flatten(0, 1), self._output_weight(), labels, mask, self.shard, self.tp, bias=self._head().bias)
        order = None
        if self.order is not None and batch.swapped is not None:
            order = F.cross_entropy(self.order_logits(x), batch.swapped, reduction="sum")
            if batch.places is not None:  # of a cut sequence, one rank has the first token
                order = order * (batch.places[0] == 0)
        return Loss(total, mask.sum(), order)

    def output(self, x: Tensor) -> Tensor:
        """Final hidden states to the masked words' logits, fp32 `[seq, batch, vocab]` on every tensor-parallel rank."""
        shares = [self._output_weight()], [self._head().bias]
        columns = column_products(self._words(x), self.tp, self.sequence_parallel, *shares)[0]
        return gather_from(columns, self.tp, -1)[..., : self.shard.vocab].float()

    def pooled(self, x: Tensor) -> Tensor:
        """Final hidden states to `[batch, hidden]`, which stands for the whole sample; equal on every tensor-parallel rank."""
        if self.pooler is None:
            raise ValueError("this BERT has no pooler (--bert-no-binary-head), or this stage is not the last")
        first = gather_from(x[:1], self.tp, 0)[0] if self.sequence_parallel else x[0]
        return torch.tanh(self.pooler(first))

    def order_logits(self, x: Tensor) -> Tensor:
        """Final hidden states to fp32 `[batch, 2]`: in order, swapped."""
        if self.order is None:
            raise ValueError("this BERT has no binary head (--bert-no-binary-head), or this stage is not the last")
        logits: Tensor = self.order(self.pooled(x))
        return logits.float()

    def _words(self, x: Tensor) -> Tensor:
        words: Tensor = self._head()(x)
        return words

    def _head(self) -> MaskedWordHead:
        if self.masked_words is None:
            raise ValueError("this stage has no output layer")
        return self.masked_words

    def _allowed(self, batch: Batch) -> Tensor | None:
        """Within documents, bool `[batch, 1, seq, seq]`; None where all may see all, or where the keys are on several ranks."""
        if batch.documents is None or batch.places is not None:
            return None
        return (batch.documents.unsqueeze(2) == batch.documents.unsqueeze(1)).unsqueeze(1)
