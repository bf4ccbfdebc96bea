"""SQuAD 1.1 and 2.0 (arXiv 1606.05250, 1806.03822) as published: answer a question with a span of a paragraph.

A paragraph that is too long is split into overlapping windows, and the best answer of the windows counts. For a window without
the answer, and for a question of 2.0 that has none, the target is [CLS]. Scores are those of the official script: exact match
and F1 of words, in lower case, without punctuation and articles, against the best of the given answers.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron.data.errors import DataError
from megatron.data.slow_patterns import failures_as_data_errors
from megatron.data.tokenizer import Tokenizer
from megatron.tasks.reading import JsonValue, read_json_value
from megatron.tasks.samples import Example, Task, TaskScore

FORM = "SQuAD's JSON: {data: [{paragraphs: [{context, qas: [{id, question, answers: [{text, answer_start}]}]}]}]}"
MAX_QUESTION_TOKENS = 64  # and at most half of a row
MAX_ANSWER_TOKENS = 30
STRIDE = 128  # tokens between the starts of two windows, and at most half of a window


@dataclass(frozen=True)
class Paragraph:
    """A paragraph in tokens.

    Attributes:
        text: the paragraph.
        ids: its token ids.
        offsets: first character and end of each token in `text`.
    """

    text: str
    ids: Sequence[int]
    offsets: Sequence[tuple[int, int]]


@dataclass(frozen=True)
class ContextWindow:
    """The part of a paragraph in one row.

    Attributes:
        text: the whole paragraph.
        first: position of the part's first token in the row.
        offsets: first character and end of each token of the part in `text`.
        impossible: questions of this file may have no answer.
    """

    text: str
    first: int
    offsets: Sequence[tuple[int, int]]
    impossible: bool


@dataclass(frozen=True)
class Question:
    """A question about a paragraph.

    Attributes:
        place: its entry in the file, for messages.
        name: its id.
        text: the question.
        impossible: it has no answer.
        answers: text and first character in the paragraph of each answer.
    """

    place: JsonValue
    name: str
    text: str
    impossible: bool
    answers: list[tuple[str, int]]


class Squad(Task):
    """SQuAD as a task. Each example is a window of a paragraph with a question; its name is the question's id."""

    min_seq_length = 8  # half of it a question, and a word of the paragraph

    def __init__(self, tokenizer: Tokenizer, seq_length: int) -> None:
        super().__init__(tokenizer, seq_length)
        self.backend = tokenizer.backend()
        self.max_question_tokens = min(MAX_QUESTION_TOKENS, seq_length // 2)

    def read(self, path: str, *, training: bool) -> list[Example]:
        """Read a file of JSON; for training each question must have an answer, or say that there is none."""
        articles = list(read_json_value(path, FORM)["data"].items())
        paragraphs = [p for article in articles for p in article["paragraphs"].items()]
        asked = [(p["context"].text(), [_question(qa, p["context"].text()) for qa in p["qas"].items()]) for p in paragraphs]
        impossible = any(question.impossible for _, questions in asked for question in questions)
        examples: list[Example] = []
        names: dict[str, str] = {}
        for context, questions in asked:
            with failures_as_data_errors(self.tokenizer.kind):
                encoding = self.backend.encode(context, add_special_tokens=False)
            paragraph = Paragraph(context, encoding.ids, encoding.offsets)  # once: each access makes a list
            for question in questions:
                if (first := names.setdefault(question.name, question.place.place)) != question.place.place:
                    raise question.place.error(f"its id {question.name!r} is that of {first} as well; ids differ")
                if training and not question.answers and not question.impossible:
                    raise question.place.error("it has no answer: a test file cannot be trained on")
                examples += self._windows(paragraph, question, impossible=impossible)
        if not examples:
            raise DataError(f"{path}: it holds no questions; expected {FORM}")
        return examples

    def _windows(self, paragraph: Paragraph, question: Question, *, impossible: bool) -> Iterator[Example]:
        """Yield the rows of a question, each with a window of its paragraph. impossible: see `ContextWindow`."""
        ids, offsets, answers = paragraph.ids, paragraph.offsets, question.answers
        truth = [text for text, _ in answers] if answers or question.impossible else None
        first, last = _place(offsets, *answers[0]) if answers else (-1, -1)  # training takes the first of several answers
        asked = [self.cls, *self.tokenizer.tokenize(" ".join(question.text.split()))[: self.max_question_tokens], self.sep]
        room = self.seq_length - len(asked) - 1  # for the paragraph, before its [SEP]
        step = max(1, min(STRIDE, room // 2))
        for begin in range(0, max(1, len(ids) - room + step), step):
            # A window with only a part of the answer counts as one without: the target is [CLS], position 0.
            found = begin <= first <= last < begin + room
            ends = (len(asked) + first - begin, len(asked) + last - begin) if found else (0, 0)
            row = self.build_row([*asked, *ids[begin : begin + room], self.sep], len(asked), {0: ends[0], 1: ends[1]})
            window = ContextWindow(paragraph.text, len(asked), offsets[begin : begin + room], impossible)
            yield Example((row,), question.name, truth, window)

    def decode(self, example: Example, logits: Tensor) -> list[Any]:
        """Return score and text of the best span, and the score of no answer. logits: `[2, seq]`, of starts and of ends."""
        window: ContextWindow = example.detail
        places = slice(window.first, window.first + len(window.offsets))
        start, end = logits[0, places].double(), logits[1, places].double()  # both [window]
        none = float(logits[0, 0] + logits[1, 0])  # at [CLS]
        if not len(start):
            return [-1e30, "", none]
        sums = start[:, None] + end[None, :]  # [window, window]: a span from row to column
        # The end must not be before the start, nor too far after it. [window, window]
        allowed = torch.ones_like(sums, dtype=torch.bool).triu().tril(MAX_ANSWER_TOKENS - 1)
        first, last = divmod(int(sums.masked_fill(~allowed, -torch.inf).argmax()), len(end))
        text = window.text[window.offsets[first][0] : window.offsets[last][1]]
        return [float(sums[first, last]), text, none]

    def list_answers(self, examples: Sequence[Example], answers: Sequence[Any]) -> list[dict[str, Any]]:
        """Return one answer for each question, from all its windows."""
        return [{"id": name, "answer": text} for name, text in best_answers(examples, answers).items()]

    def score(self, examples: Sequence[Example], answers: Sequence[Any]) -> TaskScore:
        """Return exact match and F1, each against the best of the given answers."""
        exact = f1 = 0.0
        truths = {example.name: example.truth for example in examples if example.truth is not None}  # none in test files
        for name, text in best_answers(examples, answers).items():
            if name not in truths:
                continue
            # An answer of articles only normalizes to the empty text, like no answer.
            given = [t for t in truths[name] if normalize_answer(t)] or [""]
            exact += max(normalize_answer(text) == normalize_answer(truth) for truth in given)
            f1 += max(word_f1(text, truth) for truth in given)
        total = len(truths)
        metrics = {"exact_match": 100.0 * exact / total, "f1": 100.0 * f1 / total} if total else {}
        return TaskScore(metrics, {"correct": int(exact), "total": total})


def _question(qa: JsonValue, context: str) -> Question:
    """Return one entry of `qas`, checked; DataError for a wrong one."""
    name = str(qa["id"].content) if type(qa["id"].content) is int else qa["id"].text()
    impossible = "is_impossible" in qa and qa["is_impossible"].boolean()
    answers = [_answer(answer, context) for answer in qa["answers"].items()] if "answers" in qa else []
    return Question(qa, name, qa["question"].text(), impossible, answers)


def _answer(answer: JsonValue, context: str) -> tuple[str, int]:
    """Return the text of an answer, and its first character in the paragraph."""
    text, start = answer["text"].text(), answer["answer_start"].integer(len(context))
    if not text.strip():
        rule = "it is empty; a question without an answer has an empty list of `answers`, and is_impossible true"
        raise answer["text"].error(rule)
    if context[start : start + len(text)] != text:
        there = context[start : start + len(text)][:60]
        raise answer.error(f"the paragraph has no {text[:60]!r} at character {start}, where answer_start says, but {there!r}")
    return text, start


def _place(offsets: Sequence[tuple[int, int]], answer: str, begin: int) -> tuple[int, int]:
    """Return the first and last token of a paragraph that an answer overlaps; the last is before the first if none does."""
    end = begin + len(answer)
    first = next((i for i, (_, behind) in enumerate(offsets) if behind > begin), len(offsets))
    last = next((i for i in reversed(range(len(offsets))) if offsets[i][0] < end), -1)
    return first, last


def best_answers(examples: Sequence[Example], answers: Sequence[Any]) -> dict[str, str]:
    """Return the answer to each question, from those of its windows; "" for no answer, if the file allows it."""
    # For each question, score and text of the best span of its windows, and the lowest score of no answer.
    spans: dict[str, tuple[float, str]] = {}
    nothing: dict[str, float] = {}
    for example, (value, text, none) in zip(examples, answers, strict=True):
        spans[example.name] = max(spans.get(example.name, (-float("inf"), "")), (value, text))
        # The question has no answer only if no window has one.
        nothing[example.name] = min(nothing.get(example.name, float("inf")), none)
    impossible = {example.name: example.detail.impossible for example in examples}
    return {name: "" if impossible[name] and nothing[name] > value else text for name, (value, text) in spans.items()}


def normalize_answer(text: str) -> str:
    """Return a text in lower case, without punctuation and articles, with single spaces."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def word_f1(text: str, truth: str) -> float:
    """Return the F1 score of the words of two texts; if one has no words, 1 if both have none, else 0."""
    here, there = normalize_answer(text).split(), normalize_answer(truth).split()
    if not here or not there:
        return float(here == there)
    common = sum((Counter(here) & Counter(there)).values())
    return 2.0 * common / (len(here) + len(there))
