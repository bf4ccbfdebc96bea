"""Open texts to score, in a plain file, JSON lines or an indexed dataset, and check them before a model is loaded."""

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
    """A text. where: its place for messages, `FILE` or `FILE:LINE`."""

    where: str
    text: str


@dataclass(frozen=True)
class TokenizedDocument:
    """A tokenized text.

    Attributes:
        where: its place for messages.
        tokens: its token ids.
        words: number of words, separated by white space; 0 for a document of an indexed dataset.
        bytes: number of bytes in UTF-8; 0 for a document of an indexed dataset.
    """

    where: str
    tokens: Sequence[int]
    words: int = 0
    bytes: int = 0


class TextFile:
    """A plain text, which is one document, or JSON lines of the form {"text": ...}, one document each (.jsonl, .json).

    It may be compressed. The constructor reads the whole file to check it, and raises a DataError that names file and line.
    """

    has_text = True

    def __init__(self, file: str, *, lines: bool | None = None) -> None:
        self.file, self.lines = file, bare_name(file).endswith((".jsonl", ".json")) if lines is None else lines
        # sum() reads all texts, which checks them; any() would stop at the first.
        if not sum(bool(source.text.strip()) for source in self.texts()):
            raise DataError(f"{file}: there is no text in it")

    def texts(self) -> Iterator[SourceText]:
        """Yield the texts in order."""
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
        """Return the tokenized texts, without special tokens; DataError, at once, if the tokenizer is None."""
        if tokenizer is None:
            raise DataError(f"{self.file}: this is text, and the checkpoint contains no tokenizer for it")
        return (
            TokenizedDocument(
                source.where, tokenizer.tokenize(source.text), len(source.text.split()), len(source.text.encode("utf-8"))
            )
            for source in self.texts()
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
        """Raise a DataError, since the dataset contains no text."""
        raise DataError(f"{self.file}: an indexed dataset contains tokens, not text")

    def documents(self, tokenizer: Tokenizer | None) -> Iterator[TokenizedDocument]:
        """Return the documents of the dataset, including their end-of-document tokens if there are any.

        Args:
            tokenizer: the checkpoint's tokenizer; None if it has none.

        Raises:
            DataError: at once, if the dataset was made with another tokenizer.
        """
        if tokenizer is not None:
            check_tokenizer(self.dataset, tokenizer)
        boundaries = self.dataset.documents.tolist()  # the first sequence of each document, then the number of sequences
        return (
            TokenizedDocument(
                f"{self.file}, document {number}", [token for i in range(first, end) for token in self.dataset[i].tolist()]
            )
            for number, (first, end) in enumerate(pairwise(boundaries))
        )


TextSource = TextFile | TokenFile


def open_source(file: str) -> TextSource:
    """Open a text file, or an indexed dataset by its prefix; DataError if it is missing or damaged."""
    if file.endswith((".bin", ".idx")) or (not os.path.exists(file) and os.path.exists(file + ".idx")):
        return TokenFile(file)
    return TextFile(file)
