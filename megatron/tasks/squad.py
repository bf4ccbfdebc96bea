"""SQuAD 1.1 and 2.0 (arXiv 1606.05250, 1806.03822) in the published format: answer a question with a span of a paragraph.

A paragraph that is too long is split into overlapping windows, and the best answer of all windows counts. The target is [CLS]
in a window without the answer, and for a question of 2.0 that has none. Scores are the official script's: exact match and
F1 of words, in lower case, without punctuation and articles, each against the right answer that it matches best.
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

FORMAT = "SQuAD's JSON: {data: [{paragraphs: [{context, qas: [{id, question, answers: [{text, answer_start}]}]}]}]}"
MAX_QUESTION_TOKENS = 64  # a question has at most half of a row, too
MAX_ANSWER_TOKENS = 30
MAX_STRIDE = 128  # tokens between the starts of two windows, which is also at most half of a window


@dataclass(frozen=True)
class Paragraph:
    """A tokenized paragraph.

    Attributes:
        text: the paragraph.
        ids: its token ids.
        offsets: start and end of each token, as characters of `text`.
    """

    text: str
    ids: Sequence[int]
    offsets: Sequence[tuple[int, int]]


@dataclass(frozen=True)
class ContextWindow:
    """The part of a paragraph that one row contains.

    Attributes:
        text: the whole paragraph.
        first: position in the row of the part's first token.
        offsets: start and end of each token of the part, as characters of `text`.
        may_be_impossible: the file has questions without an answer, so this may be one of them.
    """

    text: str
    first: int
    offsets: Sequence[tuple[int, int]]
    may_be_impossible: bool


@dataclass(frozen=True)
class Question:
    """A question about a paragraph.

    Attributes:
        entry: its JSON in the file, for messages.
        name: its id.
        text: its text.
        impossible: the paragraph does not answer it.
        answers: right answers, each as its text and the character of the paragraph at which that starts.
    """

    entry: JsonValue
    name: str
    text: str
    impossible: bool
    answers: list[tuple[str, int]]


class Squad(Task):
    """SQuAD as a task. Each example is a window of a paragraph with a question; its name is the question's id."""

    min_seq_length = 8  # half of it for the question, and room for a word of the paragraph

    def __init__(self, tokenizer: Tokenizer, seq_length: int) -> None:
        super().__init__(tokenizer, seq_length)
        self.backend = tokenizer.backend()
        self.max_question_tokens = min(MAX_QUESTION_TOKENS, seq_length // 2)

    def read(self, path: str, *, training: bool) -> list[Example]:
        """Read a JSON file. For training, each question must have an answer or be marked as impossible."""
        articles = list(read_json_value(path, FORMAT)["data"].items())
        paragraphs = [p for article in articles for p in article["paragraphs"].items()]
        contexts = [paragraph["context"].text() for paragraph in paragraphs]
        questions = [
            [_read_question(entry, context) for entry in paragraph["qas"].items()]
            for paragraph, context in zip(paragraphs, contexts, strict=True)
        ]
        some_impossible = any(question.impossible for group in questions for question in group)
        examples: list[Example] = []
        places: dict[str, str] = {}  # where each id occurs first
        for context, group in zip(contexts, questions, strict=True):
            with failures_as_data_errors(self.tokenizer.kind):
                encoding = self.backend.encode(context, add_special_tokens=False)
            paragraph = Paragraph(context, encoding.ids, encoding.offsets)  # each access of encoding.offsets makes a new list
            for question in group:
                if (first := places.setdefault(question.name, question.entry.place)) != question.entry.place:
                    raise question.entry.error(f"its id {question.name!r} is that of {first} as well; ids must differ")
                if training and not question.answers and not question.impossible:
                    raise question.entry.error("it has no answer: a test file cannot be trained on")
                examples += self._build_windows(paragraph, question, may_be_impossible=some_impossible)
        if not examples:
            raise DataError(f"{path}: it contains no questions; expected {FORMAT}")
        return examples

    def _build_windows(self, paragraph: Paragraph, question: Question, *, may_be_impossible: bool) -> Iterator[Example]:
        """Yield an example for each window of the paragraph. may_be_impossible: see `ContextWindow`."""
        ids, offsets, answers = paragraph.ids, paragraph.offsets, question.answers
        truth = [text for text, _ in answers] if answers or question.impossible else None
        # Training uses the first of several answers.
        first, last = _find_tokens(offsets, *answers[0]) if answers else (-1, -1)
        prefix = [self.cls, *self.tokenizer.tokenize(" ".join(question.text.split()))[: self.max_question_tokens], self.sep]
        room = self.seq_length - len(prefix) - 1  # tokens of the paragraph that fit before the last [SEP]
        step = max(1, min(MAX_STRIDE, room // 2))
        for begin in range(0, max(1, len(ids) - room + step), step):
            # A window with only a part of the answer counts as one without it: the target is [CLS], position 0.
            contains_answer = begin <= first <= last < begin + room
            start, end = (len(prefix) + first - begin, len(prefix) + last - begin) if contains_answer else (0, 0)
            row = self.build_row([*prefix, *ids[begin : begin + room], self.sep], len(prefix), {0: start, 1: end})
            window = ContextWindow(paragraph.text, len(prefix), offsets[begin : begin + room], may_be_impossible)
            yield Example((row,), question.name, truth, window)

    def decode(self, example: Example, logits: Tensor) -> list[Any]:
        """Return score and text of the best span, and the score of no answer. logits: `[2, seq]`, for starts and ends."""
        window: ContextWindow = example.detail
        positions = slice(window.first, window.first + len(window.offsets))
        start, end = logits[0, positions].double(), logits[1, positions].double()  # both [window]
        no_answer = float(logits[0, 0] + logits[1, 0])  # at [CLS]
        if not len(start):
            return [-1e30, "", no_answer]
        sums = start[:, None] + end[None, :]  # [window, window]: row is the start, column the end
        # The end must not be before the start, nor MAX_ANSWER_TOKENS or more after it. [window, window]
        allowed = torch.ones_like(sums, dtype=torch.bool).triu().tril(MAX_ANSWER_TOKENS - 1)
        first, last = divmod(int(sums.masked_fill(~allowed, -torch.inf).argmax()), len(end))
        text = window.text[window.offsets[first][0] : window.offsets[last][1]]
        return [float(sums[first, last]), text, no_answer]

    def list_answers(self, examples: Sequence[Example], answers: Sequence[Any]) -> list[dict[str, Any]]:
        """Return one answer for each question, the best of all its windows."""
        return [{"id": name, "answer": text} for name, text in best_answers(examples, answers).items()]

    def score(self, examples: Sequence[Example], answers: Sequence[Any]) -> TaskScore:
        """Return exact match and F1, each against the right answer that it matches best."""
        exact = f1 = 0.0
        # Questions of test files have no known answer.
        truths = {example.name: example.truth for example in examples if example.truth is not None}
        for name, text in best_answers(examples, answers).items():
            if name not in truths:
                continue
            # As in the official script, right answers that normalize to an empty text do not count.
            given = [truth for truth in truths[name] if normalize_answer(truth)] or [""]
            exact += max(normalize_answer(text) == normalize_answer(truth) for truth in given)
            f1 += max(word_f1(text, truth) for truth in given)
        total = len(truths)
        metrics = {"exact_match": 100.0 * exact / total, "f1": 100.0 * f1 / total} if total else {}
        return TaskScore(metrics, {"correct": int(exact), "total": total})


def _read_question(entry: JsonValue, context: str) -> Question:
    """Return an entry of `qas` about the paragraph `context`; DataError for a wrong one."""
    name = str(entry["id"].content) if type(entry["id"].content) is int else entry["id"].text()
    impossible = "is_impossible" in entry and entry["is_impossible"].boolean()
    answers = [_read_answer(answer, context) for answer in entry["answers"].items()] if "answers" in entry else []
    return Question(entry, name, entry["question"].text(), impossible, answers)


def _read_answer(answer: JsonValue, context: str) -> tuple[str, int]:
    """Return the text of an answer, and the character of the paragraph at which it starts; DataError if it is not there."""
    text, start = answer["text"].text(), answer["answer_start"].integer(len(context))
    if not text.strip():
        problem = "it is empty; a question without an answer has an empty list of `answers`, and is_impossible true"
        raise answer["text"].error(problem)
    if context[start : start + len(text)] != text:
        found = context[start : start + len(text)][:60]
        raise answer.error(f"at character {start}, its answer_start, the paragraph has {found!r} instead of {text[:60]!r}")
    return text, start


def _find_tokens(offsets: Sequence[tuple[int, int]], answer: str, begin: int) -> tuple[int, int]:
    """Return first and last token of a paragraph that overlap with an answer; if none does, last is less than first."""
    end = begin + len(answer)
    first = next((i for i, (_, token_end) in enumerate(offsets) if token_end > begin), len(offsets))
    last = next((i for i in reversed(range(len(offsets))) if offsets[i][0] < end), -1)
    return first, last


def best_answers(examples: Sequence[Example], answers: Sequence[Any]) -> dict[str, str]:
    """Return the best answer to each question from those of its windows; "" for no answer, where the file has such."""
    best_spans: dict[str, tuple[float, str]] = {}  # score and text
    no_answer_scores: dict[str, float] = {}  # the lowest of the windows, since one window with an answer is enough
    for example, (span_score, text, no_answer) in zip(examples, answers, strict=True):
        best_spans[example.name] = max(best_spans.get(example.name, (-float("inf"), "")), (span_score, text))
        no_answer_scores[example.name] = min(no_answer_scores.get(example.name, float("inf")), no_answer)
    may_be_impossible = {example.name: example.detail.may_be_impossible for example in examples}
    return {
        name: "" if may_be_impossible[name] and no_answer_scores[name] > span_score else text
        for name, (span_score, text) in best_spans.items()
    }


def normalize_answer(text: str) -> str:
    """Return a text in lower case, without punctuation and articles, with single spaces."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def word_f1(text: str, truth: str) -> float:
    """Return the F1 score of the words of an answer; 1 if both texts have no words, 0 if only one has none."""
    words, true_words = normalize_answer(text).split(), normalize_answer(truth).split()
    if not words or not true_words:
        return float(words == true_words)
    common = sum((Counter(words) & Counter(true_words)).values())
    return 2.0 * common / (len(words) + len(true_words))
