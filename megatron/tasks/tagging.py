"""Tagging in the format of CoNLL-2003 (cs/0306050): a word per line, its tag in the last column, empty lines between sentences.

The tag of a word is predicted at its first token. Scores are the share of right tags and, for tags in the schemes IOB1, IOB2,
IOBES and BILOU, the F1 of whole entities: an entity is right if its words and its kind are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor

from megatron.data.errors import DataError
from megatron.data.tokenizer import Tokenizer
from megatron.tasks.reading import read_task_text
from megatron.tasks.samples import Example, Task, TaskScore

DOCUMENT_START = "-DOCSTART-"  # first column of a line between two documents
Sentence = list[tuple[str, str]]  # words with their tags


def read_sentences(path: str) -> Iterator[Sentence]:
    """Yield the words of each sentence with their tags; DataError with file and line for a wrong line."""
    return (words for _, words in numbered_sentences(path))


def numbered_sentences(path: str) -> Iterator[tuple[int, Sentence]]:
    """Yield each sentence with the line number of its first word; its other words are on the following lines."""
    words: Sentence = []
    for number, line in enumerate([*read_task_text(path).split("\n"), ""], 1):  # the added empty line ends the last sentence
        columns = line.split()
        if columns and columns[0] != DOCUMENT_START:
            if len(columns) < 2:
                raise DataError(f"{path}:{number}: {line[:60]!r} is not a word and its tag, separated by white space")
            words.append((columns[0], columns[-1]))
        elif words:
            yield number - len(words), words
            words = []


def collect_labels(paths: Iterable[str]) -> tuple[str, ...]:
    """Return all tags of the files, sorted, with O first."""
    tags = {tag for path in paths for words in read_sentences(path) for _, tag in words}
    return tuple(sorted(tags, key=lambda tag: (tag != "O", tag)))


class Tagging(Task):
    """Tagging as a task: a tag for each word. labels: all tags, in the order of the model's outputs.

    A sentence that is too long is cut off at its end, and the tags of the words there count as wrong.
    """

    def __init__(self, tokenizer: Tokenizer, seq_length: int, labels: Sequence[str]) -> None:
        super().__init__(tokenizer, seq_length)
        self.labels = list(labels)

    def read(self, path: str, *, training: bool) -> list[Example]:
        """Read a file of words and tags; DataError for a tag that the model does not have."""
        label_ids = {tag: number for number, tag in enumerate(self.labels)}
        examples, num_cut = [], 0
        for count, (line, words) in enumerate(numbered_sentences(path)):
            if unknown := [(line + n, tag) for n, (_, tag) in enumerate(words) if tag not in label_ids]:
                known = ", ".join(self.labels)
                known = known if len(known) <= 200 else f"{known[:200]}... ({len(self.labels)} in all)"
                raise DataError(f"{path}:{unknown[0][0]}: the model has no tag {unknown[0][1][:60]}; it has {known}")
            row_tokens, first_tokens = [self.cls], {}  # first_tokens: position of each word's first token, by the word's number
            for number, (word, _) in enumerate(words):
                word_tokens = self.tokenizer.tokenize(word) or [self.tokenizer.token("unk")]
                if len(row_tokens) + len(word_tokens) >= self.seq_length:
                    num_cut += len(words) - number
                    break
                first_tokens[number] = len(row_tokens)
                row_tokens += word_tokens
            answers = {position: label_ids[words[number][1]] for number, position in first_tokens.items()}
            row = self.build_row([*row_tokens, self.sep], len(row_tokens) + 1, answers)
            examples.append(Example((row,), str(count), [tag for _, tag in words], first_tokens))
        if not examples:
            raise DataError(f"{path}: it contains no words")
        if num_cut:
            self.notes.append(f"{path}: {num_cut} words are cut off by --seq-length {self.seq_length}")
        return examples

    def decode(self, example: Example, logits: Tensor) -> list[str]:
        """Return the most probable tag of each word; O for words that were cut off. logits: `[seq, tags]`."""
        best = logits.argmax(dim=-1).tolist()  # [seq]
        positions = [example.detail.get(number) for number in range(len(example.truth))]
        return ["O" if position is None else self.labels[best[position]] for position in positions]

    def score(self, examples: Sequence[Example], answers: Sequence[Any]) -> TaskScore:
        """Return the share of right tags, and the F1 of whole entities if the tags mark entities."""
        correct = total = hits = found = expected = 0
        for example, tags in zip(examples, answers, strict=True):
            is_right = [true_tag == tag for true_tag, tag in zip(example.truth, tags, strict=True)]
            correct += sum(right for number, right in enumerate(is_right) if number in example.detail)
            total += len(example.truth)
            true_entities, given_entities = set(entities(example.truth)), set(entities(tags))
            hits += len(true_entities & given_entities)
            found, expected = found + len(given_entities), expected + len(true_entities)
        metrics, counts = {"accuracy": 100.0 * correct / max(1, total)}, {"correct": correct, "total": total}
        if not any(True for label in self.labels for _ in entities([label])):  # the tags mark words, not entities
            return TaskScore(metrics, counts)
        return TaskScore({**metrics, "f1": 200.0 * hits / max(1, found + expected)}, {**counts, "entities": expected})


def entities(tags: Sequence[str]) -> Iterator[tuple[int, int, str]]:
    """Yield each entity as the numbers of its first word and of the word after its last, and its kind.

    I-X that does not continue an entity begins one, as in the script conlleval.
    """
    begin, kind = 0, ""
    for number, tag in enumerate([*tags, "O"]):  # the added tag ends the last entity
        prefix, _, tag_kind = tag.partition("-")
        # An entity ends where the next tag does not continue it.
        if kind and (prefix not in ("I", "E", "L") or tag_kind != kind):
            yield begin, number, kind
            kind = ""
        if prefix in ("B", "I", "E", "L", "S", "U") and not kind:
            begin, kind = number, tag_kind
        if kind and prefix in ("E", "L", "S", "U"):
            yield begin, number + 1, kind
            kind = ""
