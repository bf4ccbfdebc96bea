"""Tagging in the format of CoNLL-2003 (cs/0306050): a word per line, its tag in the last column, empty lines between sentences.

The tag is predicted at the first piece of each word. The score is the share of right tags, and the F1 of whole entities for
tags of the forms IOB1, IOB2, IOBES and BILOU: an entity is right if its words and its kind are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor

from megatron.data.errors import DataError
from megatron.data.tokenizer import Tokenizer
from megatron.tasks.reading import read_task_text
from megatron.tasks.samples import Example, Task, TaskScore

DOCUMENT = "-DOCSTART-"
Sentence = list[tuple[str, str]]


def read_sentences(path: str) -> Iterator[Sentence]:
    """Yield the words of each sentence with their tags; DataError with file and line for a wrong line."""
    return (words for _, words in numbered_sentences(path))


def numbered_sentences(path: str) -> Iterator[tuple[int, Sentence]]:
    """Yield each sentence with the line number of its first word; its other words are on the following lines."""
    words: Sentence = []
    for number, line in enumerate([*read_task_text(path).split("\n"), ""], 1):  # the empty line ends the last sentence
        columns = line.split()
        if columns and columns[0] != DOCUMENT:
            if len(columns) < 2:
                raise DataError(f"{path}:{number}: {line[:60]!r} is not a word and its tag, separated by white space")
            words.append((columns[0], columns[-1]))
        elif words:
            yield number - len(words), words
            words = []


def collect_labels(paths: Iterable[str]) -> tuple[str, ...]:
    """Return all tags of the files, O first."""
    tags = {tag for path in paths for words in read_sentences(path) for _, tag in words}
    return tuple(sorted(tags, key=lambda tag: (tag != "O", tag)))


class Tagging(Task):
    """Tagging as a task: a tag for each word. labels: the tags, in the order of the model's outputs.

    A sentence that is too long is cut at its end, and the words there count as wrong.
    """

    def __init__(self, tokenizer: Tokenizer, seq_length: int, labels: Sequence[str]) -> None:
        super().__init__(tokenizer, seq_length)
        self.labels = list(labels)

    def read(self, path: str, *, training: bool) -> list[Example]:
        """Read a file of words and tags; DataError for a tag that the model does not have."""
        numbers = {tag: number for number, tag in enumerate(self.labels)}
        examples, cut = [], 0
        for count, (line, words) in enumerate(numbered_sentences(path)):
            if strange := [(line + n, tag) for n, (_, tag) in enumerate(words) if tag not in numbers]:
                has = ", ".join(self.labels)
                has = has if len(has) <= 200 else f"{has[:200]}... ({len(self.labels)} in all)"
                raise DataError(f"{path}:{strange[0][0]}: the model has no tag {strange[0][1][:60]}; it has {has}")
            tokens, places = [self.cls], {}  # places: position of each word's first piece, by the number of the word
            for position, (word, _) in enumerate(words):
                pieces = self.tokenizer.tokenize(word) or [self.tokenizer.token("unk")]
                if len(tokens) + len(pieces) >= self.seq_length:
                    cut += len(words) - position
                    break
                places[position] = len(tokens)
                tokens += pieces
            row = self.build_row([*tokens, self.sep], len(tokens) + 1, {at: numbers[words[p][1]] for p, at in places.items()})
            examples.append(Example((row,), str(count), [tag for _, tag in words], places))
        if not examples:
            raise DataError(f"{path}: it holds no words")
        if cut:
            self.notes.append(f"{path}: {cut} words lie beyond --seq-length {self.seq_length}")
        return examples

    def decode(self, example: Example, logits: Tensor) -> list[str]:
        """Return the most probable tag of each word; O for words beyond the row. logits: `[seq, tags]`."""
        best = logits.argmax(dim=-1)  # [seq]
        return [self.labels[int(best[example.detail[p]])] if p in example.detail else "O" for p in range(len(example.truth))]

    def score(self, examples: Sequence[Example], answers: Sequence[Any]) -> TaskScore:
        """Return the share of right tags, and the F1 of whole entities if the tags mark entities."""
        correct = total = hits = found = expected = 0
        for example, tags in zip(examples, answers, strict=True):
            seen = [(a, b) for p, (a, b) in enumerate(zip(example.truth, tags, strict=True)) if p in example.detail]
            correct, total = correct + sum(a == b for a, b in seen), total + len(example.truth)
            true, given = set(entities(example.truth)), set(entities(tags))
            hits, found, expected = hits + len(true & given), found + len(given), expected + len(true)
        metrics, counts = {"accuracy": 100.0 * correct / max(1, total)}, {"correct": correct, "total": total}
        if not any(True for label in self.labels for _ in entities([label])):  # tags of words, such as parts of speech
            return TaskScore(metrics, counts)
        return TaskScore({**metrics, "f1": 200.0 * hits / max(1, found + expected)}, {**counts, "entities": expected})


def entities(tags: Sequence[str]) -> Iterator[tuple[int, int, str]]:
    """Yield first word, word after the last, and kind of each entity.

    I-X without an entity to continue begins one, as in the script conlleval.
    """
    begin, kind = 0, ""
    for place, tag in enumerate([*tags, "O"]):
        prefix, _, here = tag.partition("-")
        # An entity ends where the next tag does not continue it.
        if kind and (prefix not in ("I", "E", "L") or here != kind):
            yield begin, place, kind
            kind = ""
        if prefix in ("B", "I", "E", "L", "S", "U") and not kind:
            begin, kind = place, here
        if kind and prefix in ("E", "L", "S", "U"):
            yield begin, place + 1, kind
            kind = ""
