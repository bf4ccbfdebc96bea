"""Encode the lines of a corpus as token ids, in this process or by workers.

Blocks of lines go to the workers and come back as token ids, in the order of the input. So the result does not depend on the
number of workers, and the memory in use does not grow with the corpus. A long document is tokenized part by part, so that it
takes little more memory than its line of JSON.
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

BATCH_CHARACTERS = 1 << 20  # of text that is tokenized at once
MAX_QUEUED_BYTES = 1 << 24  # of JSON that is under way, for each worker


@dataclass(frozen=True)
class PreprocessConfig:
    """Settings of preprocessing.

    Attributes:
        keys: keys of the JSON objects; each gets a dataset of its own.
        plain_special_tokens: special tokens in texts are tokenized like any other text.
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
        size: bytes of JSON.
        bad: reasons and skipped lines.
        special_tokens: number of times that each one stands in the texts.
    """

    columns: list[TokenColumn]
    documents: int
    size: int
    bad: list[tuple[str, bytes]] = field(default_factory=list)
    special_tokens: Counter[str] = field(default_factory=Counter)

    @property
    def longest_part(self) -> int:
        """Characters of the longest text that the tokenizer was given at once."""
        return max(column.longest_part for column in self.columns)


class UnreadableTexts(Exception):
    """Texts that the tokenizer refuses. reasons: the reason for each, by the number of its document in the block."""

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
        """Encode a block of lines. Raises DataError for a bad line, unless those are to be skipped."""
        good: list[tuple[Line, list[str]]] = []
        bad: list[tuple[str, bytes]] = []
        for line in lines:
            try:
                good.append((line, parse_line(line, self.settings.keys)))
            except BadLine as error:
                self._reject(line, error, bad)
        while True:  # until no text is left that the tokenizer gives up on
            try:
                columns = [self.column([texts[i] for _, texts in good]) for i in range(len(self.settings.keys))]
                break
            except UnreadableTexts as error:
                for number, why in error.reasons.items():
                    line = good[number][0]
                    self._reject(line, BadLine(f"{line.file}:{line.number}: {why}"), bad)
                good = [row for number, row in enumerate(good) if number not in error.reasons]
        special_tokens = self._special(text for _, texts in good for text in texts)
        return EncodedBlock(columns, len(good), sum(len(line.text) for line in lines), bad, special_tokens)

    def _reject(self, line: Line, error: BadLine, bad: list[tuple[str, bytes]]) -> None:
        """Add a line to the skipped ones; DataError where bad lines are not to be skipped."""
        if not self.settings.skip_bad_lines:
            raise DataError(f"{error}; --on-bad-line=skip goes on without such lines") from error
        bad.append((str(error), line.text))

    def column(self, texts: Sequence[str]) -> TokenColumn:
        """Encode the texts of one key. A document without tokens has no sequence, and gets neither a first token nor an end.

        Raises UnreadableTexts for those that the tokenizer gives up on, all at once: a block may hold many.
        """
        try:
            return self._column(texts)
        except DataError:  # of one text or of several: now each by itself
            reasons = {number: why for number, text in enumerate(texts) if (why := self._refusal(text))}
            if reasons:
                raise UnreadableTexts(reasons) from None
            raise

    def _refusal(self, text: str) -> str | None:
        """Return the reason for which the tokenizer gives up on a text; None where it does not."""
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
        """Yield the texts that the tokenizer is given at once, each with the numbers of its document and sequence."""
        keep = self.settings.keep_newlines
        for document, text in enumerate(texts):
            whole = split_sentences(text, keep) if self.settings.split_sentences else (text,)
            yield from ((document, number, part) for number, seq in enumerate(whole) for part in self.tokenizer.parts(seq))

    def append(self, parts: Sequence[tuple[int, int, str]], column: ColumnBuilder) -> None:
        """Tokenize parts of texts and append their tokens. DataError for an id beyond the tokenizer's own vocabulary size."""
        for (document, sequence, _), ids in zip(parts, self.tokenizer.tokenize_many([p[2] for p in parts]), strict=True):
            if ids and max(ids) >= self.tokenizer.vocab_size:
                raise DataError(f"the tokenizer gave id {max(ids)}, but has {self.tokenizer.vocab_size} ids")
            column.append(document, sequence, ids)


def init_worker() -> None:
    """Prepare a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is the parent's business
    threading.Thread(target=exit_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process per core is parallel enough


def exit_with_parent() -> None:
    """End this worker when its parent is killed: it holds both ends of the pool's pipe, and would otherwise wait for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@functools.lru_cache(maxsize=1)
def process_encoder(settings: PreprocessConfig) -> Encoder:
    """Return the encoder of this process, built with its first block."""
    return Encoder(settings)


def encode_block(settings: PreprocessConfig, lines: list[Line]) -> EncodedBlock:
    """Encode a block in a worker process."""
    return process_encoder(settings)(lines)


def encode_blocks(settings: PreprocessConfig, source: Iterable[list[Line]], workers: int) -> Iterator[EncodedBlock]:
    """Yield every block encoded, in order.

    At most four blocks per worker are under way, and fewer where documents are long.

    Args:
        settings: build the encoder of each worker.
        source: blocks of lines.
        workers: processes; 1 encodes in this one.

    Raises:
        RuntimeError: when a worker dies.
    """
    if workers <= 1:
        yield from map(Encoder(settings), source)
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy the threads' locks of the tokenizer
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
