"""Open the texts to score, from a plain file, JSON lines or an indexed dataset, and check them before a model is loaded."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from megatron.data.corpus import BadLine, parse_line, read_blocks
from megatron.data.errors import DataError
from megatron.data.indexed import IndexedDataset
from megatron.data.matching import check_tokenizer
from megatron.data.packed import bare_name
from megatron.data.tokenizer import Tokenizer
from megatron.tasks.reading import read_task_text

TEXT_KEY = "text"


@dataclass(frozen=True)
class SourceText:
    """A text, and its place for messages: `FILE` or `FILE:LINE`."""

    where: str
    text: str


@dataclass(frozen=True)
class TokenizedDocument:
    """A text in tokens.

    Attributes:
        where: its place, for messages.
        tokens: its token ids.
        words: number of words, separated by white space; 0 if only tokens are known.
        bytes: number of bytes in UTF-8; 0 if only tokens are known.
    """

    where: str
    tokens: Sequence[int]
    words: int = 0
    bytes: int = 0


class TextFile:
    """A plain text, which is one document, or JSON lines of the form {"text": ...}, one document each (.jsonl, .json).

    It may be compressed. The whole file is read once when it is opened: DataError, with file and line, if it holds no text.
    """

    has_text = True

    def __init__(self, file: str, *, lines: bool | None = None) -> None:
        self.file, self.lines = file, bare_name(file).endswith((".jsonl", ".json")) if lines is None else lines
        if not sum(bool(text.text.strip()) for text in self.texts()):  # reads all texts, which checks them
            raise DataError(f"{file}: there is no text in it")

    def texts(self) -> Iterator[SourceText]:
        """Yield the texts, one after the other."""
        if self.lines:
            for block in read_blocks([self.file]):
                for line in block:
                    try:
                        yield SourceText(f"{line.file}:{line.number}", parse_line(line, [TEXT_KEY], advice="")[0])
                    except BadLine as error:
                        raise DataError(str(error)) from error
        else:
            yield SourceText(self.file, read_task_text(self.file))

    def documents(self, tokenizer: Tokenizer | None) -> Iterator[TokenizedDocument]:
        """Return the texts in tokens, without special tokens. DataError at once if there is no tokenizer."""
        if tokenizer is None:
            raise DataError(f"{self.file}: a text, and the checkpoint holds no tokenizer for it")
        return (
            TokenizedDocument(t.where, tokenizer.tokenize(t.text), len(t.text.split()), len(t.text.encode("utf-8")))
            for t in self.texts()
        )


class TokenFile:
    """An indexed dataset, opened by its prefix."""

    has_text = False

    def __init__(self, prefix: str) -> None:
        self.dataset = IndexedDataset(prefix)
        self.file = self.dataset.prefix
        if not self.dataset.token_count:
            raise DataError(f"{self.file}: there are no tokens in it")

    def texts(self) -> Iterator[SourceText]:
        """Raise a DataError: there is no text."""
        raise DataError(f"{self.file}: an indexed dataset, which holds tokens and no text")

    def documents(self, tokenizer: Tokenizer | None) -> Iterator[TokenizedDocument]:
        """Return the documents of the dataset, with their end-of-document tokens if they have some.

        Args:
            tokenizer: the checkpoint's tokenizer; None if it holds none.

        Raises:
            DataError: the dataset was made with another tokenizer; raised at once.
        """
        if tokenizer is not None:
            check_tokenizer(self.dataset, tokenizer)
        starts = self.dataset.documents.tolist()  # the sequence at which each document starts, and the end of the last
        return (
            TokenizedDocument(
                f"{self.file}, document {number}", [t for i in range(first, end) for t in self.dataset[i].tolist()]
            )
            for number, (first, end) in enumerate(pairwise(starts))
        )


TextSource = TextFile | TokenFile


def open_source(file: str) -> TextSource:
    """Open the file or dataset of this name; DataError if it is missing or damaged."""
    if file.endswith((".bin", ".idx")) or (not os.path.exists(file) and os.path.exists(file + ".idx")):
        return TokenFile(file)
    return TextFile(file)
