"""MNLI and QQP in GLUE's format (arXiv 1804.07461): tab-separated lines, each with two sentences and their class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from megatron.data.errors import DataError
from megatron.data.tokenizer import Tokenizer
from megatron.tasks.reading import read_task_text
from megatron.tasks.samples import Example, Task, TaskScore


@dataclass(frozen=True)
class Columns:
    """Names of the columns in a file's header line.

    Attributes:
        name: column of the example's id.
        first: column of the first sentence.
        second: column of the second sentence.
        label: column of the class, which test files lack.
    """

    name: str
    first: str
    second: str
    label: str


MNLI = Columns("pairID", "sentence1", "sentence2", "gold_label")
QQP = Columns("id", "question1", "question2", "is_duplicate")
NO_GOLD = "-"  # label of a pair on which MNLI's annotators did not agree


def accuracy(examples: Sequence[Example], answers: Sequence[Any]) -> TaskScore:
    """Return the share of right answers in the examples with a known answer; no metric if there are none, as in test files."""
    pairs = [(example.truth, answer) for example, answer in zip(examples, answers, strict=True) if example.truth is not None]
    correct = sum(truth == answer for truth, answer in pairs)
    return TaskScore({"accuracy": 100.0 * correct / len(pairs)} if pairs else {}, {"correct": correct, "total": len(pairs)})


class PairClassification(Task):
    """Classification of sentence pairs. labels: names of the classes, in the order of the model's outputs."""

    def __init__(self, tokenizer: Tokenizer, seq_length: int, columns: Columns, labels: Sequence[str]) -> None:
        super().__init__(tokenizer, seq_length)
        self.columns, self.labels = columns, list(labels)

    def read(self, path: str, *, training: bool) -> list[Example]:
        """Read a file of tab-separated values; for training, leave out pairs without a class."""
        lines = read_task_text(path).split("\n")  # not splitlines(), since sentences contain other line separators
        header = lines[0].rstrip("\r").split("\t")
        names = vars(self.columns)
        indices = {role: header.index(name) for role, name in names.items() if name in header}
        if missing := [names[role] for role in ("name", "first", "second") if role not in indices]:
            raise DataError(f"{path}: its first line names no column {', '.join(missing)}; it has {', '.join(header)[:200]}")
        if training and "label" not in indices:
            raise DataError(f"{path}: it has no column {self.columns.label}: a test file cannot be trained on")
        examples, broken_lines = [], []
        for number, line in enumerate(lines[1:], 2):
            cells = line.rstrip("\r").split("\t")
            if len(cells) != len(header):
                # The cells cannot be assigned to columns, so the line is left out, with a note below.
                broken_lines += [number] if line.strip() else []
                continue
            example = self._build_example(f"{path}:{number}", {role: cells[index] for role, index in indices.items()})
            if not training or example.truth is not None:
                examples.append(example)
        if not examples:
            raise DataError(f"{path}: it contains no samples under the {len(header)} columns of its first line")
        if broken_lines:  # the published QQP has a few
            what = f"{len(broken_lines)} lines without {len(header)} columns are left out"
            self.notes.append(f"{path}: {what}; the first is line {broken_lines[0]}")
        return examples

    def _build_example(self, where: str, cells: dict[str, str]) -> Example:
        label = cells.get("label", NO_GOLD)
        if label not in (*self.labels, NO_GOLD):
            raise DataError(f"{where}: {self.columns.label} is {label!r}; legal: {', '.join(self.labels)}")
        first, second = (self.tokenizer.tokenize(" ".join(cells[role].split())) for role in ("first", "second"))
        if label == NO_GOLD:
            row = self.build_pair(first, second, 0)
            row.loss_mask[:] = False  # the model answers it, but it has no loss and no score
            return Example((row,), cells["name"], None)
        return Example((self.build_pair(first, second, self.labels.index(label)),), cells["name"], label)

    def decode(self, example: Example, logits: Tensor) -> str:
        """Return the name of the most probable class. logits: `[classes]`."""
        return self.labels[int(logits.argmax())]

    def score(self, examples: Sequence[Example], answers: Sequence[Any]) -> TaskScore:
        """Return the accuracy."""
        return accuracy(examples, answers)
