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
from megatron.files.regular import MAX_TASK_JSON_BYTES, parse_json
from megatron.tasks.glue import accuracy
from megatron.tasks.samples import Item, Score, Task
from megatron.tasks.sources import read_text

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
        text = read_text(str(file), MAX_TASK_JSON_BYTES)
        try:
            whole = parse_json(text)
            article = " ".join(whole["article"].split())
            asked = list(zip(whole["questions"], whole["options"], whole["answers"], strict=True))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            form = "a JSON object with article, questions, options and answers, as many of each"
            raise DataError(f"{file}: it is not {form}: {type(error).__name__}: {error}") from error
        context = self.tokenizer.tokenize(article)
        for number, (question, options, answer) in enumerate(asked):
            where = f"{file}, question {number}"
            if not isinstance(question, str) or not isinstance(options, list) or not all(isinstance(o, str) for o in options):
                raise DataError(f"{where}: question and options are not text")
            if len(options) != self.rows or answer not in self.labels:
                legal = f"{self.rows} options, answer one of {', '.join(self.labels)}"
                raise DataError(f"{where}: {len(options)} options, answer {answer!r}; legal: {legal}")
            right = self.labels.index(answer)
            rows = tuple(self._row(question, option, context, right) for option in options)
            for row in rows[1:]:  # the first stands for all
                row.guessed[:] = False
            yield Item(rows, f"{file.stem}-{number}", answer)

    def _row(self, question: str, option: str, context: Sequence[int], right: int) -> Any:
        text = question.replace("_", option) if "_" in question else f"{question} {option}"
        return self.pair(self.tokenizer.tokenize(" ".join(text.split()))[:LONGEST_QUESTION], context, right)

    def decode(self, item: Item, logits: Tensor) -> str:
        return self.labels[int(logits.argmax())]

    def score(self, items: Sequence[Item], answers: Sequence[Any]) -> Score:
        return accuracy(items, answers)
