"""Examples of a task: rows of tokens, their answers and scores, and the order in which training reads them."""

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
        rows: input of the model, several rows for a choice, with the right answer in `labels` where `loss_mask` is true.
        name: name of the example in its file, for results and messages.
        truth: the right answer, as the score compares it; None if it is not known.
        detail: further values that `Task.decode` needs.
    """

    rows: tuple[PairSample, ...]
    name: str
    truth: Any
    detail: Any = None


@dataclass(frozen=True)
class TaskScore:
    """The score of some answers.

    Attributes:
        metrics: metrics by name, in percent.
        counts: the numbers from which they were computed, by name.
    """

    metrics: dict[str, float]
    counts: dict[str, int]


class Task(ABC):
    """A task: reads published files as examples, which are rows of tokens, and scores the answers to them.

    Args:
        tokenizer: a tokenizer with [CLS], [SEP] and padding.
        seq_length: maximum number of tokens in a row.

    Attributes:
        notes: lines for the user about the files.

    Raises:
        DataError: the tokenizer lacks one of the tokens, or `seq_length` is too short for an example.
    """

    rows: int = 1  # number of rows of each example
    min_seq_length: int = 3  # room for one token between [CLS] and [SEP]

    def __init__(self, tokenizer: Tokenizer, seq_length: int) -> None:
        if seq_length < self.min_seq_length:
            raise DataError(f"--seq-length {seq_length} has no room for a sample; legal: {self.min_seq_length} and above")
        self.tokenizer, self.seq_length = tokenizer, seq_length
        self.cls, self.sep = tokenizer.token("cls"), tokenizer.token("sep")
        self.notes: list[str] = []

    @abstractmethod
    def read(self, path: str, *, training: bool) -> list[Example]:
        """Return the examples of a file or directory, in order.

        Args:
            path: the file or directory.
            training: leave out examples without a right answer.

        Raises:
            DataError: an entry is wrong; the message names file and line.
        """

    @abstractmethod
    def decode(self, example: Example, logits: Tensor) -> Any:
        """Return the model's answer to one example as a JSON value, from its logits."""

    def list_answers(self, examples: Sequence[Example], answers: Sequence[Any]) -> list[dict[str, Any]]:
        """Return the answers for the file of results, each with the name of its example."""
        return [{"id": example.name, "answer": answer} for example, answer in zip(examples, answers, strict=True)]

    @abstractmethod
    def score(self, examples: Sequence[Example], answers: Sequence[Any]) -> TaskScore:
        """Return the score of the answers to all of `examples`."""

    def build_pair(self, first: Sequence[int], second: Sequence[int], answer: int) -> PairSample:
        """Return the row [CLS] first [SEP] second [SEP], cut at the end if it is too long, with the answer at [CLS].

        Args:
            first: ids of the first segment.
            second: ids of the second segment; an empty one is left out with its [SEP].
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
            tokens: ids of the row.
            first_length: number of tokens of the first segment.
            answers: labels, by their position in the row.
        """
        labels = np.zeros(len(tokens), dtype=np.int64)  # [n]
        loss_mask = np.zeros(len(tokens), dtype=np.bool_)  # [n]
        for position, answer in answers.items():
            labels[position], loss_mask[position] = answer, True
        return PairSample(np.array(tokens, dtype=np.int64), labels, loss_mask, first_length, swapped=False)

    def padding_example(self) -> Example:
        """Return an example that is masked everywhere, to fill the last batch."""
        return Example((self.build_row([self.cls, self.sep], 2, {}),) * self.rows, "", None)


class PaddedExamples(SampleSource):
    """Examples in their order, padded at the end to a multiple of `multiple` with masked ones."""

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
    """Examples reshuffled for each epoch: example i is a function of the seed and i.

    The last examples of an epoch that do not fill a global batch are left out, as in Megatron-LM; these differ in each epoch.
    DataError if there are fewer examples than one global batch.
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
        epoch, place = divmod(number, self.epoch_size)
        if epoch != self._epoch:  # a run reads in order, so only the current epoch's permutation is kept
            self._order = np.random.default_rng([self.seed, epoch]).permutation(len(self.examples))
            self._epoch = epoch
        return self.examples[int(self._order[place])]

    def locate(self, number: int, position: int) -> str:
        """Return the name of a sample, for a message about one of its tokens."""
        return self[number].name


@dataclass(frozen=True)
class ExampleCollator:
    """Collates examples into a `Batch`: all rows of one example, then those of the next.

    Attributes:
        row_collator: collates rows.
        rows: number of rows of each example.
    """

    row_collator: BertCollator
    rows: int

    def __call__(self, dataset: SampleSource, indices: Sequence[int], sample_ids: Sequence[int]) -> Batch:
        """Collate examples into a micro-batch.

        Args:
            dataset: yields examples.
            indices: numbers of the examples in the dataset.
            sample_ids: their numbers in the training order.

        Returns:
            Tensors `[examples * rows, seq]`.
        """
        rows = [row for index in indices for row in dataset[index].rows]
        # Each row gets its own number, so that its dropout masks differ from those of the others.
        row_ids = [sample_id * self.rows + row for sample_id in sample_ids for row in range(self.rows)]
        return self.row_collator.collate(rows, row_ids)
