"""BERT with the head of a task in place of those of pretraining: what is fine-tuned (arXiv 1810.04805, section 4).

    classification   pooled first token, dropout, a linear layer: a class of the sample
    choice           the same with one output for each row; consecutive rows are the choices of one sample
    span             a linear layer on each token with two outputs: where an answer starts, and where it ends
    tags             dropout and a linear layer on each token: a class of each token

Transformers' names for them are MegatronBertFor{SequenceClassification, MultipleChoice, QuestionAnswering,
TokenClassification}. A head is never cut, and is computed on whole sequences: it is small.
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
    """The last linear layer of a task, with the meaning of its logits.

    `labels` and `loss_mask` of a batch say what is right and where that counts:

    classification, choice: at the first token of each row, of a choice of its first row; the number of the class or choice.
    span: at the first two tokens, the positions of start and end.
    tags: at every token that has a tag.
    """

    def __init__(self, config: ModelConfig, tp: TensorParallel, *, seed: int) -> None:
        super().__init__(config.hidden_size, config.num_task_outputs, tp.on_whole_sequences)
        self.config, self.join = config, tp.join
        self.dropout = HiddenDropout(seed, -1, "task_head", config.hidden_dropout)

    @staticmethod
    @abstractmethod
    def shape(config: ModelConfig, batch: Batch) -> tuple[int, ...]:
        """Return the shape of the logits, which a stage without the head must know too."""

    @abstractmethod
    def logits(self, x: Tensor, pooled: Tensor | None, batch: Batch, keys: DropoutKeys | None) -> Tensor:
        """Return the task's logits, fp32.

        Args:
            x: final hidden states `[seq, batch, hidden]`, as the last layer hands them on.
            pooled: `[batch, hidden]`, for the heads that read it.
            batch: whose they are.
            keys: the random identities of all tokens; None where nothing is dropped.
        """

    @abstractmethod
    def losses(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return cross-entropies, and which of them count: two fp32 tensors of one shape.

        logits: as `logits` gives them. batch: whose labels are compared.
        """


class Classifier(TaskHead):
    """Logits `[rows, classes]`."""

    @staticmethod
    def shape(config: ModelConfig, batch: Batch) -> tuple[int, ...]:
        """Return the shape of the logits."""
        return batch.tokens.shape[0], config.num_task_outputs

    def logits(self, x: Tensor, pooled: Tensor | None, batch: Batch, keys: DropoutKeys | None) -> Tensor:
        """Return the logits; arguments as for `TaskHead.logits`."""
        if pooled is None:
            raise ValueError("this model has no pooler")
        # The pooled vector stands for the first token, and has its random identity.
        first = None if keys is None else DropoutKeys(keys.whole[:1], keys.local[:1], keys.feature, keys.weight)
        logits: Tensor = self(self.dropout(pooled.unsqueeze(0), first).squeeze(0))  # [rows, classes]
        return logits.float()

    def losses(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return cross-entropies, and which of them count."""
        rows_per_sample = batch.tokens.shape[0] // logits.shape[0]  # 1, but for multiple choice
        labels, counted = batch.labels[::rows_per_sample, 0], batch.loss_mask[::rows_per_sample, 0]  # [samples]
        return F.cross_entropy(logits, labels, reduction="none"), counted


class Chooser(Classifier):
    """Logits `[samples, choices]`; the rows of a batch are samples x choices."""

    @staticmethod
    def shape(config: ModelConfig, batch: Batch) -> tuple[int, ...]:
        """Return the shape of the logits."""
        choices = len(config.labels)
        return batch.tokens.shape[0] // choices, choices

    def logits(self, x: Tensor, pooled: Tensor | None, batch: Batch, keys: DropoutKeys | None) -> Tensor:
        """Return the logits; arguments as for `TaskHead.logits`."""
        return super().logits(x, pooled, batch, keys).view(self.shape(self.config, batch))


class SpanFinder(TaskHead):
    """Logits `[2, rows, seq]` of start and end; minus infinity at padding."""

    @staticmethod
    def shape(config: ModelConfig, batch: Batch) -> tuple[int, ...]:
        """Return the shape of the logits."""
        return 2, *batch.tokens.shape

    def logits(self, x: Tensor, pooled: Tensor | None, batch: Batch, keys: DropoutKeys | None) -> Tensor:
        """Return the logits; arguments as for `TaskHead.logits`."""
        logits: Tensor = self(self.join(x)).float().permute(2, 1, 0)  # [2, rows, seq]
        return logits if batch.documents is None else logits.masked_fill(batch.documents > 0, -torch.inf)

    def losses(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return cross-entropies, and which of them count."""
        ends = F.cross_entropy(logits.flatten(0, 1), batch.labels[:, :2].t().flatten(), reduction="none")  # [2 * rows]
        return ends, batch.loss_mask[:, :2].t().flatten()


class Tagger(TaskHead):
    """Logits `[rows, seq, classes]`."""

    @staticmethod
    def shape(config: ModelConfig, batch: Batch) -> tuple[int, ...]:
        """Return the shape of the logits."""
        return *batch.tokens.shape, config.num_task_outputs

    def logits(self, x: Tensor, pooled: Tensor | None, batch: Batch, keys: DropoutKeys | None) -> Tensor:
        """Return the logits; arguments as for `TaskHead.logits`."""
        logits: Tensor = self(self.dropout(self.join(x), keys))  # [seq, rows, classes]
        return logits.float().transpose(0, 1)

    def losses(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return cross-entropies, and which of them count."""
        return F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="none"), batch.loss_mask.flatten()


HEADS: Mapping[str, type[TaskHead]] = MappingProxyType(
    {"classification": Classifier, "choice": Chooser, "span": SpanFinder, "tags": Tagger}
)


class FineTuned(Transformer):
    """The part of a fine-tuned BERT that `part` names; arguments as for `Transformer`."""

    causal = False

    def build_heads(self, word: nn.Parameter | None) -> None:
        """Add the task's head, and the pooler where it reads one, where `part.head`."""
        config, tp, here = self.config, self.tp, self.part.head
        self.pooler = Pooler(config, tp) if here and config.has_pooler else None
        self.task_head = self._kind(config, tp, seed=self.seed) if here else None

    @property
    def _kind(self) -> type[TaskHead]:
        return HEADS[self.config.task_head or ""]

    def loss(self, x: Tensor, batch: Batch) -> Loss:
        """Return the sum of the cross-entropies of what counts, and how many these are."""
        head = self._head()
        losses, counted = head.losses(self._logits(head, x, batch, self._task_keys(batch)), batch)
        return Loss((losses * counted).sum(), batch.loss_mask.sum())

    def task_logits(self, x: Tensor, batch: Batch) -> Tensor:
        """Return from the final hidden states the task's logits, fp32, of the shape `task_shape`."""
        return self._logits(self._head(), x, batch, None)

    def task_shape(self, batch: Batch) -> tuple[int, ...]:
        """Return the shape of the task's logits, on a stage without the head too."""
        return self._kind.shape(self.config, batch)

    def _logits(self, head: TaskHead, x: Tensor, batch: Batch, keys: DropoutKeys | None) -> Tensor:
        pooled = None if self.pooler is None else self.pooler(x)
        return head.logits(x, pooled, batch, keys)

    def _head(self) -> TaskHead:
        if self.task_head is None:
            raise ValueError("this stage is not the last, and has no head")
        return self.task_head

    def _task_keys(self, batch: Batch) -> DropoutKeys | None:
        """Return the random identities of whole sequences' tokens; None where nothing is dropped."""
        if not self.training or self.config.hidden_dropout == 0.0:
            return None
        seq = batch.tokens.shape[1]
        return DropoutKeys.from_samples(self.seed, batch.samples, torch.arange(seq, device=batch.tokens.device), slice(0, seq))
