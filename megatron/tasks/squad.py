"""SQuAD 1.1 and 2.0 (arXiv 1606.05250, 1806.03822) as published: the answer to a question as a span of a paragraph.

A paragraph that is too long is seen through windows that overlap; of their answers the best one counts. A window without the
answer, and a question of 2.0 that has none, is taught to point at [CLS]. Scores are the official script's: exact match and F1
of words after lower case, without punctuation and articles, against the best of the given answers.
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
from megatron.tasks.reading import Value, read_value
from megatron.tasks.samples import Item, Score, Task

FORM = "SQuAD's JSON: {data: [{paragraphs: [{context, qas: [{id, question, answers: [{text, answer_start}]}]}]}]}"
LONGEST_QUESTION = 64  # tokens, and at most half of a row
LONGEST_ANSWER = 30  # tokens
STEP = 128  # tokens from one window's begin to the next one's, and at most half of a window


@dataclass(frozen=True)
class Paragraph:
    """A paragraph in tokens. offsets: begin and end of each in `text`."""

    text: str
    ids: Sequence[int]
    offsets: Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Window:
    """The part of a paragraph in one row. first: place of its first token in the row. offsets: of its tokens, begin and end in
    `text`. impossible: whether questions of this file can have no answer."""

    text: str
    first: int
    offsets: Sequence[tuple[int, int]]
    impossible: bool


@dataclass(frozen=True)
class Question:
    """place: in its file. answers: (text, first character in the paragraph) of each."""

    place: Value
    name: str
    text: str
    impossible: bool
    answers: list[tuple[str, int]]


class Squad(Task):
    """Items are windows; those of one question have its name."""

    shortest = 8  # half of it a question, and a word of the paragraph

    def __init__(self, tokenizer: Tokenizer, seq_length: int) -> None:
        super().__init__(tokenizer, seq_length)
        self.backend = tokenizer.backend()
        self.longest_question = min(LONGEST_QUESTION, seq_length // 2)

    def read(self, path: str, *, training: bool) -> list[Item]:
        articles = list(read_value(path, FORM)["data"].items())
        paragraphs = [p for article in articles for p in article["paragraphs"].items()]
        asked = [(p["context"].text(), [_question(qa, p["context"].text()) for qa in p["qas"].items()]) for p in paragraphs]
        impossible = any(question.impossible for _, questions in asked for question in questions)
        items: list[Item] = []
        names: dict[str, str] = {}
        for context, questions in asked:
            with failures_as_data_errors(self.tokenizer.kind):
                encoding = self.backend.encode(context, add_special_tokens=False)
            paragraph = Paragraph(context, encoding.ids, encoding.offsets)  # once: each access makes a list
            for question in questions:
                if (first := names.setdefault(question.name, question.place.place)) != question.place.place:
                    raise question.place.wrong(f"its id {question.name!r} is that of {first} as well; ids differ")
                if training and not question.answers and not question.impossible:
                    raise question.place.wrong("it has no answer: a test file cannot be trained on")
                items += self._windows(paragraph, question, impossible=impossible)
        if not items:
            raise DataError(f"{path}: it holds no questions; expected {FORM}")
        return items

    def _windows(self, paragraph: Paragraph, question: Question, *, impossible: bool) -> Iterator[Item]:
        """Yield the rows that show a question and one part of its paragraph each. impossible: as in `Window`."""
        ids, offsets, answers = paragraph.ids, paragraph.offsets, question.answers
        truth = [text for text, _ in answers] if answers or question.impossible else None
        first, last = _place(offsets, *answers[0]) if answers else (-1, -1)
        asked = [self.cls, *self.tokenizer.tokenize(" ".join(question.text.split()))[: self.longest_question], self.sep]
        room = self.seq_length - len(asked) - 1
        step = max(1, min(STEP, room // 2))
        for begin in range(0, max(1, len(ids) - room + step), step):
            found = begin <= first <= last < begin + room
            ends = (len(asked) + first - begin, len(asked) + last - begin) if found else (0, 0)
            row = self.marked([*asked, *ids[begin : begin + room], self.sep], len(asked), {0: ends[0], 1: ends[1]})
            window = Window(paragraph.text, len(asked), offsets[begin : begin + room], impossible)
            yield Item((row,), question.name, truth, window)

    def decode(self, item: Item, logits: Tensor) -> list[Any]:
        """[score of the best span, its text, score of no answer]."""
        window: Window = item.detail
        places = slice(window.first, window.first + len(window.offsets))
        start, end = logits[0, places].double(), logits[1, places].double()
        none = float(logits[0, 0] + logits[1, 0])
        if not len(start):
            return [-1e30, "", none]
        sums = start[:, None] + end[None, :]
        allowed = torch.ones_like(sums, dtype=torch.bool).triu().tril(LONGEST_ANSWER - 1)
        first, last = divmod(int(sums.masked_fill(~allowed, -torch.inf).argmax()), len(end))
        text = window.text[window.offsets[first][0] : window.offsets[last][1]]
        return [float(sums[first, last]), text, none]

    def named(self, items: Sequence[Item], answers: Sequence[Any]) -> list[dict[str, Any]]:
        """One for each question, of all its windows."""
        return [{"id": name, "answer": text} for name, text in best_answers(items, answers).items()]

    def score(self, items: Sequence[Item], answers: Sequence[Any]) -> Score:
        exact = f1 = 0.0
        truths = {item.name: item.truth for item in items if item.truth is not None}  # a test file tells none
        for name, text in best_answers(items, answers).items():
            if name not in truths:
                continue
            given = [t for t in truths[name] if normalized(t)] or [""]
            exact += max(normalized(text) == normalized(truth) for truth in given)
            f1 += max(overlap(text, truth) for truth in given)
        total = len(truths)
        metrics = {"exact_match": 100.0 * exact / total, "f1": 100.0 * f1 / total} if total else {}
        return Score(metrics, {"correct": int(exact), "total": total})


def _question(qa: Value, context: str) -> Question:
    """One of `qas`, checked. DataError names what of it is wrong."""
    name = str(qa["id"].held) if type(qa["id"].held) is int else qa["id"].text()
    impossible = "is_impossible" in qa and qa["is_impossible"].flag()
    answers = [_answer(answer, context) for answer in qa["answers"].items()] if "answers" in qa else []
    return Question(qa, name, qa["question"].text(), impossible, answers)


def _answer(answer: Value, context: str) -> tuple[str, int]:
    """The text of an answer, and its first character in the paragraph."""
    text, start = answer["text"].text(), answer["answer_start"].whole(len(context))
    if not text.strip():
        rule = "it is empty; a question without an answer has an empty list of `answers`, and is_impossible true"
        raise answer["text"].wrong(rule)
    if context[start : start + len(text)] != text:
        there = context[start : start + len(text)][:60]
        raise answer.wrong(f"the paragraph has no {text[:60]!r} at character {start}, where answer_start says, but {there!r}")
    return text, start


def _place(offsets: Sequence[tuple[int, int]], answer: str, begin: int) -> tuple[int, int]:
    """The first and the last of a paragraph's tokens that an answer touches; the last is before the first where none is."""
    end = begin + len(answer)
    first = next((i for i, (_, behind) in enumerate(offsets) if behind > begin), len(offsets))
    last = next((i for i in reversed(range(len(offsets))) if offsets[i][0] < end), -1)
    return first, last


def best_answers(items: Sequence[Item], answers: Sequence[Any]) -> dict[str, str]:
    """The text for each question, from the answers of its windows: "" where it has none, if the file allows for that."""
    spans: dict[str, tuple[float, str]] = {}
    nothing: dict[str, float] = {}
    for item, (value, text, none) in zip(items, answers, strict=True):
        spans[item.name] = max(spans.get(item.name, (-float("inf"), "")), (value, text))
        nothing[item.name] = min(nothing.get(item.name, float("inf")), none)
    impossible = {item.name: item.detail.impossible for item in items}
    return {name: "" if impossible[name] and nothing[name] > value else text for name, (value, text) in spans.items()}


def normalized(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def overlap(text: str, truth: str) -> float:
    """F1 of the two texts' words; of texts without words 1 where both have none."""
    here, there = normalized(text).split(), normalized(truth).split()
    if not here or not there:
        return float(here == there)
    common = sum((Counter(here) & Counter(there)).values())
    return 2.0 * common / (len(here) + len(there))
