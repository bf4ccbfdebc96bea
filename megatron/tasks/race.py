"""RACE in its published format (arXiv 1704.04683): a directory of .txt files, each a JSON object of an article with questions.

    {"article": "...", "questions": ["... _ .", ...], "options": [["a", "b", "c", "d"], ...], "answers": ["C", ...]}

A row is question and option, then the article, as in Megatron-LM: the option replaces the blank `_` of the question if it has
one, and follows it otherwise. Question and option together have at most 128 tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron.data.errors import DataError
from megatron.data.tokenizer import Tokenizer
from megatron.tasks.glue import accuracy
from megatron.tasks.reading import read_json_value
from megatron.tasks.samples import Example, Task, TaskScore

FORM = "RACE's JSON: {article, questions: [...], options: [[four each], ...], answers: [A to D, ...]}"
MAX_QUESTION_TOKENS = 128


class Race(Task):
    """RACE as a task: one right answer of four. labels: the names of the choices, A to D."""

    def __init__(self, tokenizer: Tokenizer, seq_length: int, labels: Sequence[str]) -> None:
        super().__init__(tokenizer, seq_length)
        self.labels, self.rows = list(labels), len(labels)

    def read(self, path: str, *, training: bool) -> list[Example]:
        """Read all .txt files of a directory; each question has its right answer, even in the test set."""
        files = sorted(Path(path).rglob("*.txt"))
        examples = [example for file in files for example in self._questions(file)]
        if not examples:
            raise DataError(f"{path}: it holds no questions: RACE's files are *.txt")
        return examples

    def _questions(self, file: Path) -> Iterator[Example]:
        """Yield the questions of a file, checked, as examples of one row for each option."""
        whole = read_json_value(str(file), FORM)
        context = self.tokenizer.tokenize(" ".join(whole["article"].text().split()))
        columns = [list(whole[name].items()) for name in ("questions", "options", "answers")]
        if len({len(column) for column in columns}) > 1:
            counts = f"{len(columns[0])} questions, {len(columns[1])} options, {len(columns[2])} answers"
            raise whole.error(f"it has {counts}, which should be as many of each; expected {FORM}")
        for number, (question, choices, answer) in enumerate(zip(*columns, strict=True)):
            options, right = [choice.text() for choice in choices.items()], answer.text()
            if len(options) != self.rows:
                raise choices.error(f"it holds {len(options)} options; legal: {self.rows}")
            if right not in self.labels:
                raise answer.error(f"it is {right[:60]!r}; legal: {', '.join(self.labels)}")
            right_index = self.labels.index(right)
            rows = tuple(self._row(question.text(), option, context, right_index) for option in options)
            for row in rows[1:]:  # the loss of an example is that of the four rows together, and is counted at the first
                row.loss_mask[:] = False
            yield Example(rows, f"{file.stem}-{number}", right)

    def _row(self, question: str, option: str, context: Sequence[int], right: int) -> Any:
        """Return the row of one option, `[CLS] question and option [SEP] article [SEP]`."""
        text = question.replace("_", option) if "_" in question else f"{question} {option}"
        return self.build_pair(self.tokenizer.tokenize(" ".join(text.split()))[:MAX_QUESTION_TOKENS], context, right)

    def decode(self, example: Example, logits: Tensor) -> str:
        """Return the most probable option. logits: `[options]`."""
        return self.labels[int(logits.argmax())]

    def score(self, examples: Sequence[Example], answers: Sequence[Any]) -> TaskScore:
        """Return the accuracy."""
        return accuracy(examples, answers)
