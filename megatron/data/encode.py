"""Encode the lines of a corpus as token ids, in this process or in worker processes.

Workers encode blocks of lines, and the encoded blocks are returned in the order of the input. So the result does not depend on
the number of workers, and memory use does not grow with the corpus. Where the tokenizer allows a cut, a long text is tokenized
part by part, and takes little more memory than its line of JSON; for other texts see `uncut_text_note` in `preprocess.py`.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field

from megatron.config.schema import TokenizerConfig
from megatron.data.columns import ColumnBuilder, TokenColumn
from megatron.data.corpus import BadLine, Line, parse_line
from megatron.data.errors import DataError
from megatron.data.indexed import token_dtype
from megatron.data.sentences import split_sentences
from megatron.data.special_tokens import SpecialTokenCounter
from megatron.data.tokenizer import Tokenizer, build_tokenizer

BATCH_CHARACTERS = 1 << 20  # characters that are tokenized at once
MAX_QUEUED_BYTES = 1 << 24  # bytes of JSON in blocks that are submitted but not yet returned, per worker


@dataclass(frozen=True)
class PreprocessConfig:
    """Settings of preprocessing.

    Attributes:
        tokenizer: settings of the tokenizer.
        keys: keys of the JSON objects; the texts of each key go to a dataset of its own.
        append_eod: end each document with the end-of-document token.
        plain_special_tokens: tokenize special tokens in texts like any other text.
        split_sentences: make each sentence a sequence.
        keep_newlines: keep the white space after each sentence as part of it.
        skip_bad_lines: skip invalid lines instead of raising a DataError.
    """

    tokenizer: TokenizerConfig
    keys: tuple[str, ...] = ("text",)
    append_eod: bool = False
    plain_special_tokens: bool = False
    split_sentences: bool = False
    keep_newlines: bool = False
    skip_bad_lines: bool = False


@dataclass
class EncodedBlock:
    """One block of lines after tokenization.

    Attributes:
        columns: one for each key.
        documents: number of documents.
        size: bytes of JSON.
        bad: reason and content of each skipped line.
        special_tokens: number of occurrences of each special token in the texts.
    """

    columns: list[TokenColumn]
    documents: int
    size: int
    bad: list[tuple[str, bytes]] = field(default_factory=list)
    special_tokens: Counter[str] = field(default_factory=Counter)

    @property
    def longest_part(self) -> int:
        """Length of the longest text that the tokenizer was given at once, in characters."""
        return max(column.longest_part for column in self.columns)


class UnreadableTexts(Exception):
    """The tokenizer failed on some texts. reasons: the error for each, by its index in the texts given to `Encoder.column`."""

    def __init__(self, reasons: Mapping[int, str]) -> None:
        super().__init__()
        self.reasons = reasons


class Encoder:
    """Encodes lines as token ids, with one tokenizer."""

    def __init__(self, settings: PreprocessConfig) -> None:
        self.settings = settings
        self.tokenizer: Tokenizer = build_tokenizer(settings.tokenizer)
        if settings.plain_special_tokens:
            self.tokenizer.read_special_as_text()
        self.ends = [self.tokenizer.eod] if settings.append_eod else []
        self.begins = [self.tokenizer.token("bos")] if settings.tokenizer.bos_token is not None else []
        self.dtype = token_dtype(self.tokenizer.vocab_size)
        self._special = SpecialTokenCounter(self.tokenizer.special_in_text)

    def __call__(self, lines: Sequence[Line]) -> EncodedBlock:
        """Encode a block of lines. Raises DataError for a bad line, unless `skip_bad_lines` is set."""
        good: list[tuple[Line, list[str]]] = []
        bad: list[tuple[str, bytes]] = []
        for line in lines:
            try:
                good.append((line, parse_line(line, self.settings.keys)))
            except BadLine as error:
                self._reject(line, error, bad)
        while True:  # until the tokenizer succeeds on all texts that are left
            try:
                columns = [self.column([texts[i] for _, texts in good]) for i in range(len(self.settings.keys))]
                break
            except UnreadableTexts as error:
                for number, reason in error.reasons.items():
                    line = good[number][0]
                    self._reject(line, BadLine(f"{line.file}:{line.number}: {reason}"), bad)
                good = [row for number, row in enumerate(good) if number not in error.reasons]
        special_tokens = self._special(text for _, texts in good for text in texts)
        return EncodedBlock(columns, len(good), sum(len(line.text) for line in lines), bad, special_tokens)

    def _reject(self, line: Line, error: BadLine, bad: list[tuple[str, bytes]]) -> None:
        """Add a line to the skipped ones; DataError unless `skip_bad_lines` is set."""
        if not self.settings.skip_bad_lines:
            raise DataError(f"{error}; --on-bad-line=skip skips such lines") from error
        bad.append((str(error), line.text))

    def column(self, texts: Sequence[str]) -> TokenColumn:
        """Encode the texts of one key. A document without tokens gets no sequence, no BOS token and no EOD token.

        Raises:
            UnreadableTexts: with all texts of the block on which the tokenizer fails.
            DataError: even with `skip_bad_lines`, if the tokenizer gives an id that exceeds its vocabulary.
        """
        try:
            return self._column(texts)
        except DataError:  # find the texts that cause it by tokenizing each by itself
            reasons = {number: reason for number, text in enumerate(texts) if (reason := self._failure(text))}
            if reasons:
                raise UnreadableTexts(reasons) from None
            raise

    def _failure(self, text: str) -> str | None:
        """Return the tokenizer's error message for a text; None if it succeeds."""
        try:
            self.tokenizer.tokenize_many([part for *_, part in self.parts([text])])
        except DataError as error:
            return str(error)
        return None

    def _column(self, texts: Sequence[str]) -> TokenColumn:
        column = ColumnBuilder(len(texts), self.begins, self.ends, self.dtype)
        parts: list[tuple[int, int, str]] = []  # document, sequence, text
        size = 0
        for part in self.parts(texts):
            parts.append(part)
            size += len(part[2])
            column.longest_part = max(column.longest_part, len(part[2]))
            if size >= BATCH_CHARACTERS:
                self.append(parts, column)
                parts, size = [], 0
        self.append(parts, column)
        return column.finish()

    def parts(self, texts: Sequence[str]) -> Iterator[tuple[int, int, str]]:
        """Yield the parts in which texts are tokenized, as (number of the document, number of the sequence in it, part)."""
        keep = self.settings.keep_newlines
        for document, text in enumerate(texts):
            sequences = split_sentences(text, keep) if self.settings.split_sentences else (text,)
            for number, sequence in enumerate(sequences):
                yield from ((document, number, part) for part in self.tokenizer.parts(sequence))

    def append(self, parts: Sequence[tuple[int, int, str]], column: ColumnBuilder) -> None:
        """Tokenize parts of texts and append their tokens; DataError if an id is not below the tokenizer's vocabulary size."""
        texts = [text for _, _, text in parts]
        for (document, sequence, _), ids in zip(parts, self.tokenizer.tokenize_many(texts), strict=True):
            if ids and max(ids) >= self.tokenizer.vocab_size:
                raise DataError(f"the tokenizer gave id {max(ids)}, but has {self.tokenizer.vocab_size} ids")
            column.append(document, sequence, ids)


def init_worker() -> None:
    """Prepare a worker process: signals, a watch on its parent, and no threads in the tokenizer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles interrupts
    threading.Thread(target=exit_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process per core is parallel enough


def exit_with_parent() -> None:
    """End this worker when its parent has died: it holds both ends of the pool's pipe open, and would wait forever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@functools.lru_cache(maxsize=1)
def process_encoder(settings: PreprocessConfig) -> Encoder:
    """Return this process's encoder, which is built on the first call."""
    return Encoder(settings)


def encode_block(settings: PreprocessConfig, lines: list[Line]) -> EncodedBlock:
    """Encode a block in a worker process."""
    return process_encoder(settings)(lines)


def encode_blocks(settings: PreprocessConfig, source: Iterable[list[Line]], workers: int) -> Iterator[EncodedBlock]:
    """Encode blocks of lines, and yield the encoded blocks in the same order.

    At most four blocks per worker are submitted ahead, fewer if documents are long (MAX_QUEUED_BYTES).

    Args:
        settings: settings of preprocessing.
        source: blocks of lines.
        workers: number of worker processes; 1 encodes in this process.

    Raises:
        RuntimeError: when a worker dies.
    """
    if workers <= 1:
        yield from map(Encoder(settings), source)
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy locks that the tokenizer's threads hold
    with ProcessPoolExecutor(workers, context, initializer=init_worker) as pool:
        waiting: deque[tuple[int, Future[EncodedBlock]]] = deque()
        queued = 0
        try:
            for lines in source:
                size = sum(len(line.text) for line in lines)
                while waiting and (len(waiting) >= 4 * workers or queued + size > MAX_QUEUED_BYTES * workers):
                    queued -= waiting[0][0]
                    yield waiting.popleft()[1].result()
                waiting.append((size, pool.submit(encode_block, settings, lines)))
                queued += size
            while waiting:
                yield waiting.popleft()[1].result()
        except BrokenProcessPool as error:
            raise RuntimeError("a worker process died, perhaps for lack of memory; try fewer --workers") from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
