"""BERT for fine-tuning, with the head of a task in place of the heads of pretraining (arXiv 1810.04805, section 4).

    classification   pooled first token, dropout, a linear layer: the class of a sample
    choice           the same with one output for each row; consecutive rows are the choices of one sample
    span             a linear layer on each token with two outputs: the start and the end of an answer
    tags             dropout and a linear layer on each token: the class of each token

Transformers calls these models MegatronBertFor{SequenceClassification, MultipleChoice, QuestionAnswering, TokenClassification}.
The heads are small, so every tensor-parallel rank computes them whole, on whole sequences.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.config.schema import ModelConfig
from megatron.contract import Batch, Loss
from megatron.model.bert import Dense, Pooler
from megatron.model.block import HiddenDropout
from megatron.model.transformer import Transformer
from megatron.parallel.random import DropoutKeys
from megatron.parallel.tensor_parallel import TensorParallel


class TaskHead(Dense):
    """The last linear layer of a task, and the loss of its logits.

    A batch's `labels` contain the correct answers, and its `loss_mask` is 1 at the tokens that have one:

    classification: index of the class, at the first token of each row.
    choice: index of the correct choice, at the first token of the first row of each sample.
    span: positions of start and end, at the first two tokens of each row.
    tags: index of the tag, at every token that has one.
    """

    def __init__(self, config: ModelConfig, tp: TensorParallel, *, seed: int) -> None:
        super().__init__(config.hidden_size, config.num_task_outputs, tp.on_whole_sequences)
        self.config, self.join = config, tp.join
        self.dropout = HiddenDropout(seed, -1, "task_head", config.hidden_dropout)

    @staticmethod
    @abstractmethod
    def shape(config: ModelConfig, batch: Batch) -> tuple[int, ...]:
        """Return the shape of the logits, which the other pipeline stages need in order to receive them."""

    @abstractmethod
    def logits(self, x: Tensor, pooled: Tensor | None, batch: Batch, keys: DropoutKeys | None) -> Tensor:
        """Return the task's logits, fp32.

        Args:
            x: final hidden states `[seq, batch, hidden]`; under sequence parallelism, this rank's slice of the sequence.
            pooled: `[batch, hidden]`, for the heads that read it; else None.
            batch: the micro-batch of these states.
            keys: the random keys of all tokens; None without dropout.
        """

    @abstractmethod
    def losses(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return cross-entropies and the mask of those that count, two fp32 tensors of the same shape.

        Args:
            logits: the result of `logits`.
            batch: the micro-batch, with its labels.
        """


class Classifier(TaskHead):
    """Logits `[rows, classes]`."""

    @staticmethod
    def shape(config: ModelConfig, batch: Batch) -> tuple[int, ...]:
        """Return the shape of the logits."""
        return batch.tokens.shape[0], config.num_task_outputs

    def logits(self, x: Tensor, pooled: Tensor | None, batch: Batch, keys: DropoutKeys | None) -> Tensor:
        if pooled is None:
            raise ValueError("this model has no pooler")
        # The pooled vector takes the random key of the first token.
        first = None if keys is None else DropoutKeys(keys.whole[:1], keys.local[:1], keys.feature, keys.weight)
        logits: Tensor = self(self.dropout(pooled.unsqueeze(0), first).squeeze(0))  # [rows, classes]
        return logits.float()

    def losses(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return cross-entropies, and which of them count."""
        rows_per_sample = batch.tokens.shape[0] // logits.shape[0]  # more than 1 only for multiple choice
        labels, counted = batch.labels[::rows_per_sample, 0], batch.loss_mask[::rows_per_sample, 0]  # each [samples]
        return F.cross_entropy(logits, labels, reduction="none"), counted


class Chooser(Classifier):
    """Logits `[samples, choices]`; the rows of a batch are samples x choices."""

    @staticmethod
    def shape(config: ModelConfig, batch: Batch) -> tuple[int, ...]:
        """Return the shape of the logits."""
        choices = len(config.labels)
        return batch.tokens.shape[0] // choices, choices

    def logits(self, x: Tensor, pooled: Tensor | None, batch: Batch, keys: DropoutKeys | None) -> Tensor:
        return super().logits(x, pooled, batch, keys).view(self.shape(self.config, batch))  # [samples, choices]


class SpanFinder(TaskHead):
    """Logits `[2, rows, seq]` of start and end; minus infinity at padding."""

    @staticmethod
    def shape(config: ModelConfig, batch: Batch) -> tuple[int, ...]:
        """Return the shape of the logits."""
        return 2, *batch.tokens.shape

    def logits(self, x: Tensor, pooled: Tensor | None, batch: Batch, keys: DropoutKeys | None) -> Tensor:
        logits: Tensor = self(self.join(x)).float().permute(2, 1, 0)  # [2, rows, seq]
        # Padding is a document of its own, numbered above 0.
        return logits if batch.documents is None else logits.masked_fill(batch.documents > 0, -torch.inf)

    def losses(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return cross-entropies, and which of them count."""
        ends = F.cross_entropy(logits.flatten(0, 1), batch.labels[:, :2].t().flatten(), reduction="none")  # [2 * rows]
        return ends, batch.loss_mask[:, :2].t().flatten()  # [2 * rows]


class Tagger(TaskHead):
    """Logits `[rows, seq, classes]`."""

    @staticmethod
    def shape(config: ModelConfig, batch: Batch) -> tuple[int, ...]:
        """Return the shape of the logits."""
        return *batch.tokens.shape, config.num_task_outputs

    def logits(self, x: Tensor, pooled: Tensor | None, batch: Batch, keys: DropoutKeys | None) -> Tensor:
        logits: Tensor = self(self.dropout(self.join(x), keys))  # [seq, rows, classes]
        return logits.float().transpose(0, 1)  # [rows, seq, classes]

    def losses(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return cross-entropies, and which of them count."""
        losses = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="none")  # [rows * seq]
        return losses, batch.loss_mask.flatten()


HEADS: Mapping[str, type[TaskHead]] = MappingProxyType(
    {"classification": Classifier, "choice": Chooser, "span": SpanFinder, "tags": Tagger}
)


class FineTuned(Transformer):
    """The part of a fine-tuned BERT that `part` describes; the arguments are those of `Transformer`."""

    causal = False

    def build_heads(self, word: nn.Parameter | None) -> None:
        """Add the task's head, and the pooler if it reads one, if `part.head`."""
        config, tp, is_last = self.config, self.tp, self.part.head
        self.pooler = Pooler(config, tp) if is_last and config.has_pooler else None
        self.task_head = self._head_class(config, tp, seed=self.seed) if is_last else None

    @property
    def _head_class(self) -> type[TaskHead]:
        return HEADS[self.config.task_head or ""]

    def loss(self, x: Tensor, batch: Batch) -> Loss:
        """Return the sum of the unmasked cross-entropies and their number."""
        head = self._head()
        losses, counted = head.losses(self._logits(head, x, batch, self._whole_sequence_keys(batch)), batch)
        return Loss((losses * counted).sum(), batch.loss_mask.sum())

    def task_logits(self, x: Tensor, batch: Batch) -> Tensor:
        """Return the task's logits of the final hidden states, fp32, of the shape `task_shape`."""
        return self._logits(self._head(), x, batch, None)

    def task_shape(self, batch: Batch) -> tuple[int, ...]:
        """Return the shape of the task's logits, also on a stage without the head."""
        return self._head_class.shape(self.config, batch)

    def _logits(self, head: TaskHead, x: Tensor, batch: Batch, keys: DropoutKeys | None) -> Tensor:
        pooled = None if self.pooler is None else self.pooler(x)  # [batch, hidden]
        return head.logits(x, pooled, batch, keys)

    def _head(self) -> TaskHead:
        if self.task_head is None:
            raise ValueError("this stage is not the last, and has no head")
        return self.task_head

    def _whole_sequence_keys(self, batch: Batch) -> DropoutKeys | None:
        """Return the random keys of the tokens of whole sequences; None without dropout."""
        if not self.training or self.config.hidden_dropout == 0.0:
            return None
        seq = batch.tokens.shape[1]
        return DropoutKeys.from_samples(self.seed, batch.samples, torch.arange(seq, device=batch.tokens.device), slice(0, seq))
