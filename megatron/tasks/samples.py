"""Examples of a task as rows of tokens, their scoring, and the order in which training reads them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from megatron.contract import Batch
from megatron.data.bert import PairSample
from megatron.data.bert_batch import BertCollator
from megatron.data.errors import DataError
from megatron.data.gpt import SampleSource
from megatron.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Example:
    """One example of a task.

    Attributes:
        rows: inputs of the model, one for each option of a choice, else a single one. Where `loss_mask` is true, `labels`
            contains the right answer.
        name: id of the example in its file, for results and messages.
        truth: the right answer in the form that `Task.score` compares; None if it is not known.
        detail: further values of the task, for `Task.decode` and `Task.score`.
    """

    rows: tuple[PairSample, ...]
    name: str
    truth: Any
    detail: Any = None


@dataclass(frozen=True)
class TaskScore:
    """The score of the answers to some examples.

    Attributes:
        metrics: metrics by name, in percent.
        counts: numbers of examples or parts behind the metrics, by name.
    """

    metrics: dict[str, float]
    counts: dict[str, int]


class Task(ABC):
    """A task: reads examples from files in their published format, and scores a model's answers to them.

    Args:
        tokenizer: a tokenizer with [CLS], [SEP] and padding.
        seq_length: maximum number of tokens in a row.

    Attributes:
        notes: lines for the user about the files.

    Raises:
        DataError: the tokenizer lacks one of the tokens, or `seq_length` is too short for an example.
    """

    rows: int = 1  # number of rows in each example
    min_seq_length: int = 3  # room for one token between [CLS] and [SEP]

    def __init__(self, tokenizer: Tokenizer, seq_length: int) -> None:
        if seq_length < self.min_seq_length:
            raise DataError(f"--seq-length {seq_length} is too short for a sample; legal: {self.min_seq_length} and above")
        self.tokenizer, self.seq_length = tokenizer, seq_length
        self.cls, self.sep = tokenizer.token("cls"), tokenizer.token("sep")
        self.notes: list[str] = []

    @abstractmethod
    def read(self, path: str, *, training: bool) -> list[Example]:
        """Return the examples of a file or directory, in order.

        Args:
            path: the file or directory.
            training: the examples are for training, so each needs a right answer; the task refuses or leaves out others.

        Raises:
            DataError: an entry is wrong; the message names its place in the file.
        """

    @abstractmethod
    def decode(self, example: Example, logits: Tensor) -> Any:
        """Return the model's answer to one example as a JSON value, from its logits."""

    def list_answers(self, examples: Sequence[Example], answers: Sequence[Any]) -> list[dict[str, Any]]:
        """Return the answers for --results-path as JSON values, each with the name of its example."""
        return [{"id": example.name, "answer": answer} for example, answer in zip(examples, answers, strict=True)]

    @abstractmethod
    def score(self, examples: Sequence[Example], answers: Sequence[Any]) -> TaskScore:
        """Return the score of `answers`, one for each of `examples`."""

    def build_pair(self, first: Sequence[int], second: Sequence[int], answer: int) -> PairSample:
        """Return the row `[CLS] first [SEP] second [SEP]`, whose segments are cut to fit, with the answer at [CLS].

        Args:
            first: token ids of the first segment.
            second: token ids of the second segment; one that is empty, or has no room, is left out with its [SEP].
            answer: label of the pair.
        """
        tokens = [self.cls, *first[: self.seq_length - 2], self.sep]
        first_length = len(tokens)
        if second and first_length < self.seq_length - 1:
            tokens += [*second[: self.seq_length - 1 - first_length], self.sep]
        return self.build_row(tokens, first_length, {0: answer})

    def build_row(self, tokens: Sequence[int], first_length: int, answers: dict[int, int]) -> PairSample:
        """Return a row with right answers at some of its tokens.

        Args:
            tokens: token ids of the row.
            first_length: number of tokens in the first segment, with [CLS] and [SEP].
            answers: labels by position in the row.
        """
        labels = np.zeros(len(tokens), dtype=np.int64)  # [n]
        loss_mask = np.zeros(len(tokens), dtype=np.bool_)  # [n]
        for position, answer in answers.items():
            labels[position], loss_mask[position] = answer, True
        return PairSample(np.array(tokens, dtype=np.int64), labels, loss_mask, first_length, swapped=False)

    def padding_example(self) -> Example:
        """Return an example without scored positions, to fill the last batch."""
        return Example((self.build_row([self.cls, self.sep], 2, {}),) * self.rows, "", None)


class PaddedExamples(SampleSource):
    """Examples in their order, padded at the end to a multiple of `multiple` with padding examples."""

    def __init__(self, examples: Sequence[Example], task: Task, multiple: int) -> None:
        self.examples, self.padding = examples, task.padding_example()
        self.length = -(-len(examples) // multiple) * multiple

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, number: int) -> Example:
        return self.examples[number] if number < len(self.examples) else self.padding

    def locate(self, number: int, position: int) -> str:
        """Return the name of a sample, for a message about one of its tokens."""
        return self[number].name


class ShuffledEpochs(SampleSource):
    """Examples in an order that is reshuffled for each epoch, and depends only on the seed and the epoch.

    The last examples of an epoch that do not fill a global batch are left out, as in Megatron-LM; these differ from epoch to
    epoch. The constructor raises a DataError if there are fewer examples than one global batch.
    """

    def __init__(self, examples: Sequence[Example], epochs: int, global_batch: int, seed: int) -> None:
        self.examples, self.epochs, self.seed = examples, epochs, seed
        self.epoch_size = len(examples) // global_batch * global_batch
        if not self.epoch_size:
            raise DataError(f"--train-data has {len(examples)} samples, fewer than one global batch of {global_batch}")
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        return self.epochs * self.epoch_size

    def __getitem__(self, number: int) -> Example:
        epoch, position = divmod(number, self.epoch_size)
        if epoch != self._epoch:  # training reads in order, so only the current epoch's permutation is stored
            self._order = np.random.default_rng([self.seed, epoch]).permutation(len(self.examples))
            self._epoch = epoch
        return self.examples[int(self._order[position])]

    def locate(self, number: int, position: int) -> str:
        """Return the name of a sample, for a message about one of its tokens."""
        return self[number].name


@dataclass(frozen=True)
class ExampleCollator:
    """Collates examples into a `Batch`: all rows of the first example, then those of the next.

    Attributes:
        row_collator: collates single rows.
        rows: number of rows in each example.
    """

    row_collator: BertCollator
    rows: int

    def __call__(self, dataset: SampleSource, indices: Sequence[int], sample_ids: Sequence[int]) -> Batch:
        """Collate examples into a micro-batch.

        Args:
            dataset: source of the examples.
            indices: indices of the examples in the dataset.
            sample_ids: numbers of the examples in the training order, which select their dropout masks.

        Returns:
            A batch with tensors `[examples * rows, seq]`.
        """
        rows = [row for index in indices for row in dataset[index].rows]
        # Each row gets its own number, so that the dropout masks of an example's rows differ.
        row_ids = [sample_id * self.rows + row for sample_id in sample_ids for row in range(self.rows)]
        return self.row_collator.collate(rows, row_ids)
