"""MNLI and QQP in GLUE's format (arXiv 1804.07461): tab-separated lines, each with a pair of sentences and its class."""

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
NO_GOLD = "-"  # label of a pair about which MNLI's annotators did not agree


def accuracy(examples: Sequence[Example], answers: Sequence[Any]) -> TaskScore:
    """Return the share of right answers among examples with a known truth; no metric if none has one, as in test files."""
    pairs = [(example.truth, answer) for example, answer in zip(examples, answers, strict=True) if example.truth is not None]
    correct = sum(truth == answer for truth, answer in pairs)
    return TaskScore({"accuracy": 100.0 * correct / len(pairs)} if pairs else {}, {"correct": correct, "total": len(pairs)})


class PairClassification(Task):
    """Classification of pairs of sentences as a task. labels: the classes, in the order of the model's outputs."""

    def __init__(self, tokenizer: Tokenizer, seq_length: int, columns: Columns, labels: Sequence[str]) -> None:
        super().__init__(tokenizer, seq_length)
        self.columns, self.labels = columns, list(labels)

    def read(self, path: str, *, training: bool) -> list[Example]:
        """Read a file of tab-separated values; for training, leave out the pairs without a class."""
        lines = read_task_text(path).split("\n")  # not splitlines, which also splits at separators within sentences
        header = lines[0].rstrip("\r").split("\t")
        wanted = vars(self.columns)
        places = {role: header.index(name) for role, name in wanted.items() if name in header}
        if lacking := [wanted[role] for role in ("name", "first", "second") if role not in places]:
            raise DataError(f"{path}: its first line names no column {', '.join(lacking)}; it has {', '.join(header)[:200]}")
        if training and "label" not in places:
            raise DataError(f"{path}: it has no column {self.columns.label}: a test file cannot be trained on")
        examples, torn = [], []
        for number, line in enumerate(lines[1:], 2):
            cells = line.rstrip("\r").split("\t")
            if len(cells) != len(header):
                # A broken line is left out with a note, since its cells cannot be assigned to columns.
                torn += [number] if line.strip() else []
                continue
            example = self._example(f"{path}:{number}", {role: cells[place] for role, place in places.items()})
            if not training or example.truth is not None:
                examples.append(example)
        if not examples:
            raise DataError(f"{path}: it holds no samples under the {len(header)} columns of its first line")
        if torn:  # the published QQP has a few
            self.notes.append(f"{path}: {len(torn)} lines left out that have not {len(header)} columns, the first is {torn[0]}")
        return examples

    def _example(self, where: str, cells: dict[str, str]) -> Example:
        label = cells.get("label", NO_GOLD)
        if label not in (*self.labels, NO_GOLD):
            raise DataError(f"{where}: {self.columns.label} is {label!r}; legal: {', '.join(self.labels)}")
        first, second = (self.tokenizer.tokenize(" ".join(cells[role].split())) for role in ("first", "second"))
        if label == NO_GOLD:
            row = self.build_pair(first, second, 0)
            row.loss_mask[:] = False  # it is answered, but not scored
            return Example((row,), cells["name"], None)
        return Example((self.build_pair(first, second, self.labels.index(label)),), cells["name"], label)

    def decode(self, example: Example, logits: Tensor) -> str:
        """Return the most probable class. logits: `[classes]`."""
        return self.labels[int(logits.argmax())]

    def score(self, examples: Sequence[Example], answers: Sequence[Any]) -> TaskScore:
        """Return the accuracy."""
        return accuracy(examples, answers)
