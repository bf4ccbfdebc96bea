"""What a task's samples are, how they are written as rows of tokens, and in which order training goes through them."""

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
class Item:
    """One sample. rows: what the model sees, several for a choice, with the right answer in `labels` where `guessed`.

    name: of the sample in its file, for results and messages. truth: what the score compares with. detail: what else makes an
    answer of the model's logits.
    """

    rows: tuple[PairSample, ...]
    name: str
    truth: Any
    detail: Any = None


@dataclass(frozen=True)
class Score:
    """metrics: by name, in percent or as they are. counts: the numbers that they were made of."""

    metrics: dict[str, float]
    counts: dict[str, int]


class Task(ABC):
    """A kind of samples: read from the task's published files, written as rows, and judged.

    tokenizer: has [CLS], [SEP] and padding. seq_length: tokens of the longest row. notes: to tell, of what was read.
    DataError for a tokenizer that has them not, and for rows that have no room for a sample.
    """

    rows: int = 1  # of each sample
    shortest: int = 3  # --seq-length that has room for something between [CLS] and [SEP]

    def __init__(self, tokenizer: Tokenizer, seq_length: int) -> None:
        if seq_length < self.shortest:
            raise DataError(f"--seq-length {seq_length} has no room for a sample; legal: {self.shortest} and above")
        self.tokenizer, self.seq_length = tokenizer, seq_length
        self.cls, self.sep = tokenizer.token("cls"), tokenizer.token("sep")
        self.notes: list[str] = []

    @abstractmethod
    def read(self, path: str, *, training: bool) -> list[Item]:
        """The samples of a file or directory, in order. DataError names the file and the line or entry that is wrong.

        training: only what can be trained on, with its right answer.
        """

    @abstractmethod
    def decode(self, item: Item, logits: Tensor) -> Any:
        """The model's answer to one sample as JSON holds it, from its logits."""

    def named(self, items: Sequence[Item], answers: Sequence[Any]) -> list[dict[str, Any]]:
        """The answers as results hold them."""
        return [{"id": item.name, "answer": answer} for item, answer in zip(items, answers, strict=True)]

    @abstractmethod
    def score(self, items: Sequence[Item], answers: Sequence[Any]) -> Score:
        """How good the answers to all of `items` are."""

    def pair(self, first: Sequence[int], second: Sequence[int], answer: int) -> PairSample:
        """[CLS] first [SEP] second [SEP], cut at the end where it is too long; the answer stands at [CLS]. A second segment
        that has no tokens is left out."""
        longest = self.seq_length
        tokens = [self.cls, *first[: longest - 2], self.sep]
        ends = len(tokens)
        if second and ends < longest - 1:
            tokens += [*second[: longest - 1 - ends], self.sep]
        return self.marked(tokens, ends, {0: answer})

    def marked(self, tokens: Sequence[int], first: int, answers: dict[int, int]) -> PairSample:
        """A row whose right answers stand at some of its tokens. first: tokens of the first segment."""
        labels, guessed = np.zeros(len(tokens), dtype=np.int64), np.zeros(len(tokens), dtype=np.bool_)
        for place, answer in answers.items():
            labels[place], guessed[place] = answer, True
        return PairSample(np.array(tokens, dtype=np.int64), labels, guessed, first, swapped=False)

    def nothing(self) -> Item:
        """A sample of which nothing counts: it fills the last batch."""
        return Item((self.marked([self.cls, self.sep], 2, {}),) * self.rows, "", None)


class Items(SampleSource):
    """Samples in their order, followed by ones of which nothing counts until there are a multiple of `multiple`."""

    def __init__(self, items: Sequence[Item], task: Task, multiple: int) -> None:
        self.items, self.nothing = items, task.nothing()
        self.length = -(-len(items) // multiple) * multiple

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, number: int) -> Item:
        return self.items[number] if number < len(self.items) else self.nothing

    def locate(self, number: int, position: int) -> str:
        """Return the name of a sample, for a message about one of its tokens."""
        return self[number].name


class Epochs(SampleSource):
    """Samples reshuffled for each epoch: sample i is a function of the seed and i. An epoch's last samples that make no whole
    global batch are left out, as Megatron-LM does; it leaves out others each time. DataError where there is not one batch."""

    def __init__(self, items: Sequence[Item], epochs: int, global_batch: int, seed: int) -> None:
        self.items, self.epochs, self.seed = items, epochs, seed
        self.each = len(items) // global_batch * global_batch
        if not self.each:
            raise DataError(f"--train-data has {len(items)} samples, fewer than one global batch of {global_batch}")
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        return self.epochs * self.each

    def __getitem__(self, number: int) -> Item:
        epoch, place = divmod(number, self.each)
        if epoch != self._epoch:
            self._order = np.random.default_rng([self.seed, epoch]).permutation(len(self.items))
            self._epoch = epoch
        return self.items[int(self._order[place])]

    def locate(self, number: int, position: int) -> str:
        """Return the name of a sample, for a message about one of its tokens."""
        return self[number].name


@dataclass(frozen=True)
class ItemBatches:
    """How samples become a `Batch`: all rows of one after those of the other."""

    batches: BertCollator
    rows: int

    def __call__(self, dataset: SampleSource, numbers: Sequence[int], names: Sequence[int]) -> Batch:
        """The micro-batch of these samples of the dataset, under the given numbers in the training order."""
        rows = [row for number in numbers for row in dataset[number].rows]
        each = range(self.rows)
        return self.batches.collate(rows, [name * self.rows + row for name in names for row in each])
