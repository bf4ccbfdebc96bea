"""RACE (arXiv 1704.04683) as published: a directory of .txt files, each a JSON object of an article with its questions.

    {"article": "...", "questions": ["... _ .", ...], "options": [["a", "b", "c", "d"], ...], "answers": ["C", ...]}

A row is question and option, then the article; an option goes into the question's blank `_` where it has one (Megatron-LM's
form). Question and option take at most 128 tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron.data.errors import DataError
from megatron.data.tokenizer import Tokenizer
from megatron.tasks.glue import accuracy
from megatron.tasks.reading import read_value
from megatron.tasks.samples import Item, Score, Task

FORM = "RACE's JSON: {article, questions: [...], options: [[four each], ...], answers: [A to D, ...]}"
LONGEST_QUESTION = 128


class Race(Task):
    """labels: the names of the choices, A to D."""

    def __init__(self, tokenizer: Tokenizer, seq_length: int, labels: Sequence[str]) -> None:
        super().__init__(tokenizer, seq_length)
        self.labels, self.rows = list(labels), len(labels)

    def read(self, path: str, *, training: bool) -> list[Item]:
        files = sorted(Path(path).rglob("*.txt"))
        items = [item for file in files for item in self._questions(file)]
        if not items:
            raise DataError(f"{path}: it holds no questions: RACE's files are *.txt")
        return items

    def _questions(self, file: Path) -> Iterator[Item]:
        whole = read_value(str(file), FORM)
        context = self.tokenizer.tokenize(" ".join(whole["article"].text().split()))
        columns = [list(whole[name].items()) for name in ("questions", "options", "answers")]
        if len({len(column) for column in columns}) > 1:
            counts = f"{len(columns[0])} questions, {len(columns[1])} options, {len(columns[2])} answers"
            raise whole.wrong(f"it has {counts}, which should be as many of each; expected {FORM}")
        for number, (question, choices, answer) in enumerate(zip(*columns, strict=True)):
            options, right = [choice.text() for choice in choices.items()], answer.text()
            if len(options) != self.rows:
                raise choices.wrong(f"it holds {len(options)} options; legal: {self.rows}")
            if right not in self.labels:
                raise answer.wrong(f"it is {right[:60]!r}; legal: {', '.join(self.labels)}")
            place = self.labels.index(right)
            rows = tuple(self._row(question.text(), option, context, place) for option in options)
            for row in rows[1:]:  # the first stands for all
                row.loss_mask[:] = False
            yield Item(rows, f"{file.stem}-{number}", right)

    def _row(self, question: str, option: str, context: Sequence[int], right: int) -> Any:
        text = question.replace("_", option) if "_" in question else f"{question} {option}"
        return self.pair(self.tokenizer.tokenize(" ".join(text.split()))[:LONGEST_QUESTION], context, right)

    def decode(self, item: Item, logits: Tensor) -> str:
        return self.labels[int(logits.argmax())]

    def score(self, items: Sequence[Item], answers: Sequence[Any]) -> Score:
        return accuracy(items, answers)
