"""Tagging in the format of CoNLL-2003: a word a line, its tag in the last column, an empty line between sentences.

The first piece of each word carries its tag. Beside the share of right tags the score has F1 of whole entities, for tags of the
forms IOB1, IOB2, IOBES and BILOU: an entity is right when its words and its kind are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor

from megatron.data.errors import DataError
from megatron.data.tokenizer import Tokenizer
from megatron.tasks.reading import read_text
from megatron.tasks.samples import Item, Score, Task

DOCUMENT = "-DOCSTART-"
Sentence = list[tuple[str, str]]


def sentences(path: str) -> Iterator[Sentence]:
    """(word, tag) of each word, sentence by sentence. DataError names file and line."""
    return (words for _, words in numbered_sentences(path))


def numbered_sentences(path: str) -> Iterator[tuple[int, Sentence]]:
    """As `sentences`, each with the line of its first word; those of the others follow."""
    words: Sentence = []
    for number, line in enumerate([*read_text(path).split("\n"), ""], 1):
        columns = line.split()
        if columns and columns[0] != DOCUMENT:
            if len(columns) < 2:
                raise DataError(f"{path}:{number}: {line[:60]!r} is not a word and its tag, separated by white space")
            words.append((columns[0], columns[-1]))
        elif words:
            yield number - len(words), words
            words = []


def labels_of(paths: Iterable[str]) -> tuple[str, ...]:
    """Every tag of these files, O first."""
    tags = {tag for path in paths for words in sentences(path) for _, tag in words}
    return tuple(sorted(tags, key=lambda tag: (tag != "O", tag)))


class Tagging(Task):
    """labels: the tags, in the order of the outputs. A sentence that is too long loses its end, whose words count as wrong."""

    def __init__(self, tokenizer: Tokenizer, seq_length: int, labels: Sequence[str]) -> None:
        super().__init__(tokenizer, seq_length)
        self.labels = list(labels)

    def read(self, path: str, *, training: bool) -> list[Item]:
        numbers = {tag: number for number, tag in enumerate(self.labels)}
        items, cut = [], 0
        for count, (line, words) in enumerate(numbered_sentences(path)):
            if strange := [(line + n, tag) for n, (_, tag) in enumerate(words) if tag not in numbers]:
                has = ", ".join(self.labels)
                has = has if len(has) <= 200 else f"{has[:200]}... ({len(self.labels)} in all)"
                raise DataError(f"{path}:{strange[0][0]}: the model has no tag {strange[0][1][:60]}; it has {has}")
            tokens, places = [self.cls], {}
            for position, (word, _) in enumerate(words):
                pieces = self.tokenizer.tokenize(word) or [self.tokenizer.token("unk")]
                if len(tokens) + len(pieces) >= self.seq_length:
                    cut += len(words) - position
                    break
                places[position] = len(tokens)
                tokens += pieces
            row = self.marked([*tokens, self.sep], len(tokens) + 1, {at: numbers[words[p][1]] for p, at in places.items()})
            items.append(Item((row,), str(count), [tag for _, tag in words], places))
        if not items:
            raise DataError(f"{path}: it holds no words")
        if cut:
            self.notes.append(f"{path}: {cut} words lie beyond --seq-length {self.seq_length}")
        return items

    def decode(self, item: Item, logits: Tensor) -> list[str]:
        best = logits.argmax(dim=-1)
        return [self.labels[int(best[item.detail[p]])] if p in item.detail else "O" for p in range(len(item.truth))]

    def score(self, items: Sequence[Item], answers: Sequence[Any]) -> Score:
        correct = total = hits = found = wanted = 0
        for item, tags in zip(items, answers, strict=True):
            seen = [(a, b) for p, (a, b) in enumerate(zip(item.truth, tags, strict=True)) if p in item.detail]
            correct, total = correct + sum(a == b for a, b in seen), total + len(item.truth)
            true, given = set(entities(item.truth)), set(entities(tags))
            hits, found, wanted = hits + len(true & given), found + len(given), wanted + len(true)
        metrics, counts = {"accuracy": 100.0 * correct / max(1, total)}, {"correct": correct, "total": total}
        if not any(True for label in self.labels for _ in entities([label])):  # parts of speech, say
            return Score(metrics, counts)
        return Score({**metrics, "f1": 200.0 * hits / max(1, found + wanted)}, {**counts, "entities": wanted})


def entities(tags: Sequence[str]) -> Iterator[tuple[int, int, str]]:
    """(first word, word after the last, kind) of each entity. I-X without one to go on with begins one, as conlleval has it."""
    begin, kind = 0, ""
    for place, tag in enumerate([*tags, "O"]):
        prefix, _, here = tag.partition("-")
        if kind and (prefix not in ("I", "E", "L") or here != kind):
            yield begin, place, kind
            kind = ""
        if prefix in ("B", "I", "E", "L", "S", "U") and not kind:
            begin, kind = place, here
        if kind and prefix in ("E", "L", "S", "U"):
            yield begin, place + 1, kind
            kind = ""
