"""RACE in its published format (arXiv 1704.04683): a directory of .txt files, each with an article and questions as JSON.

    {"article": "...", "questions": ["... _ .", ...], "options": [["a", "b", "c", "d"], ...], "answers": ["C", ...]}

As in Megatron-LM, a row is question and option, then the article. The option replaces the blank `_` of the question if there is
one, and follows the question otherwise. Question and option together are cut to 128 tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron.data.bert import PairSample
from megatron.data.errors import DataError
from megatron.data.tokenizer import Tokenizer
from megatron.tasks.glue import accuracy
from megatron.tasks.reading import read_json_value
from megatron.tasks.samples import Example, Task, TaskScore

FORMAT = "RACE's JSON: {article, questions: [...], options: [[four each], ...], answers: [A to D, ...]}"
MAX_QUESTION_TOKENS = 128


class Race(Task):
    """RACE as a task, with one right answer out of four. labels: names of the options, A to D."""

    def __init__(self, tokenizer: Tokenizer, seq_length: int, labels: Sequence[str]) -> None:
        super().__init__(tokenizer, seq_length)
        self.labels, self.rows = list(labels), len(labels)

    def read(self, path: str, *, training: bool) -> list[Example]:
        """Read all .txt files of a directory. Each question has a right answer, even in the published test set."""
        files = sorted(Path(path).rglob("*.txt"))
        examples = [example for file in files for example in self._read_questions(file)]
        if not examples:
            raise DataError(f"{path}: it contains no questions: RACE's files are *.txt")
        return examples

    def _read_questions(self, file: Path) -> Iterator[Example]:
        """Yield the checked questions of a file as examples with one row for each option."""
        article = read_json_value(str(file), FORMAT)
        context = self.tokenizer.tokenize(" ".join(article["article"].text().split()))
        columns = [list(article[name].items()) for name in ("questions", "options", "answers")]
        if len({len(column) for column in columns}) > 1:
            counts = f"{len(columns[0])} questions, {len(columns[1])} options, {len(columns[2])} answers"
            raise article.error(f"it has {counts}, whose numbers should be equal; expected {FORMAT}")
        for number, (question, choices, answer) in enumerate(zip(*columns, strict=True)):
            options, right_label = [choice.text() for choice in choices.items()], answer.text()
            if len(options) != self.rows:
                raise choices.error(f"it has {len(options)} options; legal: {self.rows}")
            if right_label not in self.labels:
                raise answer.error(f"it is {right_label[:60]!r}; legal: {', '.join(self.labels)}")
            right_index = self.labels.index(right_label)
            rows = tuple(self._build_option_row(question.text(), option, context, right_index) for option in options)
            for row in rows[1:]:  # an example has one loss for its four rows, which is counted at the first
                row.loss_mask[:] = False
            yield Example(rows, f"{file.stem}-{number}", right_label)

    def _build_option_row(self, question: str, option: str, context: Sequence[int], right_index: int) -> PairSample:
        """Return the row of one option, `[CLS] question and option [SEP] article [SEP]`."""
        text = question.replace("_", option) if "_" in question else f"{question} {option}"
        return self.build_pair(self.tokenizer.tokenize(" ".join(text.split()))[:MAX_QUESTION_TOKENS], context, right_index)

    def decode(self, example: Example, logits: Tensor) -> str:
        """Return the name of the most probable option. logits: `[options]`."""
        return self.labels[int(logits.argmax())]

    def score(self, examples: Sequence[Example], answers: Sequence[Any]) -> TaskScore:
        """Return the accuracy."""
        return accuracy(examples, answers)
