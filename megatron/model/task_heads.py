"""BERT with the head of a task in place of those of pretraining: what is fine-tuned (arXiv 1810.04805, section 4).

    classification   pooled first token, dropout, a linear layer: a class of the sample
    choice           the same with one output for each row; consecutive rows are the choices of one sample
    span             a linear layer on each token with two outputs: where an answer starts, and where it ends
    tags             dropout and a linear layer on each token: a class of each token

Transformers' names for them are MegatronBertFor{SequenceClassification, MultipleChoice, QuestionAnswering,
TokenClassification}. Every tensor-parallel rank holds a head whole and computes it on the whole sequence: it is small.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.contract import Batch, Loss
from megatron.model.bert import Bert, Dense
from megatron.model.block import HiddenDropout
from megatron.parallel.random import DropoutKeys


class FineTuned(Bert):
    """A BERT that answers a task. `labels` and `loss_mask` of a batch say what is right and where that counts:

    classification, choice: at the first token of each row, of a choice of its first row; the number of the class or choice.
    span: at the first two tokens, the positions of start and end.
    tags: at every token that has a tag.
    """

    def _add_heads(self) -> None:
        self.task_head: Dense | None = None
        if self.part.head:
            self.task_head = Dense(self.config.size("hidden_size"), self.config.task_outputs, self.tp.on_whole_sequences)
        self.task_dropout = HiddenDropout(self.seed, -1, "task_head", self.config.hidden_dropout)

    def loss(self, x: Tensor, batch: Batch) -> Loss:
        """The sum of the cross-entropies of what counts, and how many these are."""
        losses, counted = self._losses(self._scores(x, batch, self._random_rows(batch)), batch)
        return Loss((losses * counted).sum(), batch.loss_mask.sum())

    def task_logits(self, x: Tensor, batch: Batch) -> Tensor:
        """Final hidden states to the task's logits, fp32, of the shape `task_shape`; on every tensor-parallel rank."""
        return self._scores(x, batch, None)

    @abstractmethod
    def task_shape(self, batch: Batch) -> tuple[int, ...]:
        """Of the logits."""

    @abstractmethod
    def _scores(self, x: Tensor, batch: Batch, keys: DropoutKeys | None) -> Tensor: ...

    @abstractmethod
    def _losses(self, scores: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Cross-entropies, and which of them count: two fp32 tensors of one shape."""

    def _linear(self, x: Tensor) -> Tensor:
        if self.task_head is None:
            raise ValueError("this stage is not the last, and has no head")
        scores: Tensor = self.task_head(x)
        return scores.float()

    def _random_rows(self, batch: Batch) -> DropoutKeys | None:
        """The random identities of all tokens, also under sequence parallelism; None where nothing is dropped."""
        if not self.training or self.config.hidden_dropout == 0.0:
            return None
        seq = batch.tokens.shape[1]
        return DropoutKeys.of(self.seed, batch.samples, torch.arange(seq, device=batch.tokens.device), slice(0, seq))


class Classifier(FineTuned):
    """Logits `[rows, classes]`."""

    def task_shape(self, batch: Batch) -> tuple[int, ...]:
        return batch.tokens.shape[0], self.config.task_outputs

    def _scores(self, x: Tensor, batch: Batch, keys: DropoutKeys | None) -> Tensor:
        first = None if keys is None else DropoutKeys(keys.whole[:1], keys.local[:1], keys.feature, keys.weight)
        return self._linear(self.task_dropout(self.pooled(x).unsqueeze(0), first).squeeze(0))

    def _losses(self, scores: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        every = batch.tokens.shape[0] // scores.shape[0]  # rows of a sample
        return F.cross_entropy(scores, batch.labels[::every, 0], reduction="none"), batch.loss_mask[::every, 0]


class Chooser(Classifier):
    """Logits `[samples, choices]`; the rows of a batch are samples x choices."""

    def task_shape(self, batch: Batch) -> tuple[int, ...]:
        choices = len(self.config.labels)
        return batch.tokens.shape[0] // choices, choices

    def _scores(self, x: Tensor, batch: Batch, keys: DropoutKeys | None) -> Tensor:
        return super()._scores(x, batch, keys).view(self.task_shape(batch))


class SpanFinder(FineTuned):
    """Logits `[2, rows, seq]` of start and end; minus infinity at padding."""

    def task_shape(self, batch: Batch) -> tuple[int, ...]:
        return 2, *batch.tokens.shape

    def _scores(self, x: Tensor, batch: Batch, keys: DropoutKeys | None) -> Tensor:
        scores = self._linear(self.tp.join(x)).permute(2, 1, 0)
        return scores if batch.documents is None else scores.masked_fill(batch.documents > 0, -torch.inf)

    def _losses(self, scores: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        ends = F.cross_entropy(scores.flatten(0, 1), batch.labels[:, :2].t().flatten(), reduction="none")
        return ends, batch.loss_mask[:, :2].t().flatten()


class Tagger(FineTuned):
    """Logits `[rows, seq, classes]`."""

    def task_shape(self, batch: Batch) -> tuple[int, ...]:
        return *batch.tokens.shape, self.config.task_outputs

    def _scores(self, x: Tensor, batch: Batch, keys: DropoutKeys | None) -> Tensor:
        return self._linear(self.task_dropout(self.tp.join(x), keys)).transpose(0, 1)

    def _losses(self, scores: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        return F.cross_entropy(scores.flatten(0, 1), batch.labels.flatten(), reduction="none"), batch.loss_mask.flatten()


HEADS: Mapping[str, type[FineTuned]] = MappingProxyType(
    {"classification": Classifier, "choice": Chooser, "span": SpanFinder, "tags": Tagger}
)
