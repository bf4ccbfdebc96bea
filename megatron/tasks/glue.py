"""MNLI and QQP as GLUE publishes them: tab-separated values with a header, a pair of sentences and a class in each line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from megatron.data.errors import DataError
from megatron.data.tokenizer import Tokenizer
from megatron.tasks.reading import read_text
from megatron.tasks.samples import Item, Score, Task


@dataclass(frozen=True)
class Columns:
    """Where a file has what; names are those of its header line. label: of the class, absent from a test file."""

    name: str
    first: str
    second: str
    label: str


MNLI = Columns("pairID", "sentence1", "sentence2", "gold_label")
QQP = Columns("id", "question1", "question2", "is_duplicate")
NO_GOLD = "-"  # MNLI's annotators did not agree


def accuracy(items: Sequence[Item], answers: Sequence[Any]) -> Score:
    """The share of the samples with a known truth that were answered so; no metric where none has one, as in a test file."""
    pairs = [(item.truth, answer) for item, answer in zip(items, answers, strict=True) if item.truth is not None]
    correct = sum(truth == answer for truth, answer in pairs)
    return Score({"accuracy": 100.0 * correct / len(pairs)} if pairs else {}, {"correct": correct, "total": len(pairs)})


class PairClassification(Task):
    """A class for each pair of sentences. labels: the classes, in the order of the outputs."""

    def __init__(self, tokenizer: Tokenizer, seq_length: int, columns: Columns, labels: Sequence[str]) -> None:
        super().__init__(tokenizer, seq_length)
        self.columns, self.labels = columns, list(labels)

    def read(self, path: str, *, training: bool) -> list[Item]:
        lines = read_text(path).split("\n")
        header = lines[0].rstrip("\r").split("\t")
        wanted = vars(self.columns)
        places = {role: header.index(name) for role, name in wanted.items() if name in header}
        if lacking := [wanted[role] for role in ("name", "first", "second") if role not in places]:
            raise DataError(f"{path}: its first line names no column {', '.join(lacking)}; it has {', '.join(header)[:200]}")
        if training and "label" not in places:
            raise DataError(f"{path}: it has no column {self.columns.label}: a test file cannot be trained on")
        items, torn = [], []
        for number, line in enumerate(lines[1:], 2):
            cells = line.rstrip("\r").split("\t")
            if len(cells) != len(header):
                torn += [number] if line.strip() else []
                continue
            item = self._item(f"{path}:{number}", {role: cells[place] for role, place in places.items()})
            if not training or item.truth is not None:
                items.append(item)
        if not items:
            raise DataError(f"{path}: it holds no samples under the {len(header)} columns of its first line")
        if torn:  # the published QQP has a few
            self.notes.append(f"{path}: {len(torn)} lines left out that have not {len(header)} columns, the first is {torn[0]}")
        return items

    def _item(self, where: str, cells: dict[str, str]) -> Item:
        label = cells.get("label", NO_GOLD)
        if label not in (*self.labels, NO_GOLD):
            raise DataError(f"{where}: {self.columns.label} is {label!r}; legal: {', '.join(self.labels)}")
        first, second = (self.tokenizer.tokenize(" ".join(cells[role].split())) for role in ("first", "second"))
        if label == NO_GOLD:
            row = self.pair(first, second, 0)
            row.loss_mask[:] = False
            return Item((row,), cells["name"], None)
        return Item((self.pair(first, second, self.labels.index(label)),), cells["name"], label)

    def decode(self, item: Item, logits: Tensor) -> str:
        return self.labels[int(logits.argmax())]

    def score(self, items: Sequence[Item], answers: Sequence[Any]) -> Score:
        return accuracy(items, answers)
