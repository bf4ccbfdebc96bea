"""A corpus of JSON lines to indexed datasets, with any number of processes.

Blocks of lines go to the workers and come back as token ids, which one process writes in the order of the input. So the
output does not depend on the number of workers, and the memory in use does not grow with the corpus. A long document is
tokenized part by part, so that it takes little more memory than its line of JSON.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron.config.schema import TokenizerConfig
from megatron.data.corpus import BadLine, Line, blocks, expand, parse
from megatron.data.errors import DataError
from megatron.data.indexed import ENDINGS, IndexedWriter, token_dtype
from megatron.data.sentences import sentences
from megatron.data.tokenizer import Tokenizer, build_tokenizer
from megatron.files.outputs import Reads, check_file, files_in
from megatron.files.pending import PendingFile, remove_leftovers

BAD_LINES = ".bad.jsonl"

BATCH_CHARACTERS = 1 << 20  # of text that is tokenized at once
MAX_QUEUED_BYTES = 1 << 24  # of JSON that is under way, for each worker
HUGE_PART = 1 << 24  # characters that are worth a word when they cannot be cut


@dataclass(frozen=True)
class Settings:
    """What is made of each line. keys: of the JSON objects, each its own dataset."""

    tokenizer: TokenizerConfig
    keys: tuple[str, ...] = ("text",)
    append_eod: bool = False
    split_sentences: bool = False
    keep_newlines: bool = False
    skip_bad_lines: bool = False


@dataclass
class Column:
    """What one block gives for one key: all tokens, tokens of each sequence, sequences of each document.

    empty: documents without tokens. longest_part: characters that the tokenizer was given at once, at most.
    """

    tokens: NDArray[Any]
    lengths: NDArray[np.int64]
    sequences: NDArray[np.int64]
    empty: int
    longest_part: int


@dataclass
class Encoded:
    """One block of lines after tokenization. size: bytes of JSON. bad: skipped lines with the reason."""

    columns: list[Column]
    documents: int
    size: int
    bad: list[tuple[str, bytes]] = field(default_factory=list)


@dataclass
class Totals:
    """What a run did. size: bytes of JSON read. seconds: since the first block was asked for. longest_part: as in `Column`."""

    documents: int = 0
    tokens: int = 0
    empty: int = 0
    bad: int = 0
    size: int = 0
    seconds: float = 0.0
    longest_part: int = 0
    prefixes: list[str] = field(default_factory=list)


class Encoder:
    """Lines to token ids."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.tokenizer: Tokenizer = build_tokenizer(settings.tokenizer)
        self.eod = self.tokenizer.eod if settings.append_eod else None
        self.dtype = token_dtype(self.tokenizer.vocab_size)

    def __call__(self, lines: Sequence[Line]) -> Encoded:
        """Raises DataError for a bad line, unless those are to be skipped."""
        texts: list[list[str]] = []
        bad: list[tuple[str, bytes]] = []
        for line in lines:
            try:
                texts.append(parse(line, self.settings.keys))
            except BadLine as error:
                if not self.settings.skip_bad_lines:
                    raise DataError(f"{error}; --on-bad-line=skip goes on without such lines") from error
                bad.append((str(error), line.text))
        columns = [self.column([row[i] for row in texts]) for i in range(len(self.settings.keys))]
        return Encoded(columns, len(texts), sum(len(line.text) for line in lines), bad)

    def column(self, texts: Sequence[str]) -> Column:
        """The texts of one key. A document without tokens has no sequence, and gets no end of document."""
        column = Sequences(len(texts), [] if self.eod is None else [self.eod], self.dtype)
        parts: list[tuple[int, int, str]] = []
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
        """Yield what the tokenizer is given at once, each with the numbers of its document and of its sequence there."""
        keep = self.settings.keep_newlines
        for document, text in enumerate(texts):
            whole = sentences(text, keep) if self.settings.split_sentences else (text,)
            yield from ((document, number, part) for number, seq in enumerate(whole) for part in self.tokenizer.parts(seq))

    def append(self, parts: Sequence[tuple[int, int, str]], column: Sequences) -> None:
        """Tokenize parts of texts and append their tokens. DataError for an id that the tokenizer says it does not have."""
        for (document, sequence, _), ids in zip(parts, self.tokenizer.tokenize_many([p[2] for p in parts]), strict=True):
            if ids and max(ids) >= self.tokenizer.vocab_size:
                raise DataError(f"the tokenizer gave id {max(ids)}, but has {self.tokenizer.vocab_size} ids")
            column.append(document, sequence, ids)


class Sequences:
    """A `Column` while it grows, part of a sequence by part. eod: what ends a document."""

    def __init__(self, documents: int, eod: list[int], dtype: np.dtype[Any]) -> None:
        self._eod, self._dtype = eod, dtype
        self._tokens: list[NDArray[Any]] = []
        self._lengths: list[int] = []
        self._sequences = np.zeros(documents, np.int64)
        self._last: tuple[int, int] | None = None  # document and sequence of the last tokens
        self.longest_part = 0

    def append(self, document: int, sequence: int, ids: Sequence[int]) -> None:
        """Append tokens to a sequence of a document; nothing is nothing. Both numbers grow from call to call."""
        if not ids:
            return
        if self._last is not None and self._last[0] != document:
            self._end_document()
        if self._last != (document, sequence):
            self._lengths.append(0)
            self._sequences[document] += 1
        self._last = (document, sequence)
        self._lengths[-1] += len(ids)
        self._tokens.append(np.array(ids, self._dtype))

    def _end_document(self) -> None:
        self._lengths[-1] += len(self._eod)
        self._tokens.append(np.array(self._eod, self._dtype))

    def finish(self) -> Column:
        """Return the column; nothing can be appended after that."""
        if self._last is not None:
            self._end_document()
        tokens = np.concatenate([np.empty(0, self._dtype), *self._tokens])
        empty = int((self._sequences == 0).sum())
        return Column(tokens, np.array(self._lengths, np.int64), self._sequences, empty, self.longest_part)


def start_worker() -> None:
    """Called first in each worker process. An interrupt is the parent's business."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process per core is parallel enough


def end_with_parent() -> None:
    """End this worker when its parent is killed: the pool's workers hold both ends of its pipe, and would wait for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@functools.lru_cache(maxsize=1)
def encoder_of(settings: Settings) -> Encoder:
    """The encoder of this process, built with its first block."""
    return Encoder(settings)


def encode_block(settings: Settings, lines: list[Line]) -> Encoded:
    """What a worker process does with a block."""
    return encoder_of(settings)(lines)


def encode_all(settings: Settings, source: Iterable[list[Line]], workers: int) -> Iterator[Encoded]:
    """Every block encoded, in order. At most four blocks per worker are under way, and fewer where documents are long."""
    if workers <= 1:
        yield from map(Encoder(settings), source)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=start_worker) as pool:
        waiting: deque[tuple[int, Future[Encoded]]] = deque()
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


def preprocess(
    inputs: Sequence[str],
    output_prefix: str,
    settings: Settings,
    workers: int = 1,
    report: Callable[[Totals], None] | None = None,
) -> Totals:
    """Write `PREFIX_KEY_document.bin/.idx` (or `_sentence`) for each key, with a sidecar that names the tokenizer.

    report: called after each block. With bad lines skipped they go to `PREFIX.bad.jsonl`. Nothing is left behind, and
    older outputs stay as they were, if this fails or is interrupted. Raises DataError for wrong input.
    """
    files = expand(inputs)
    tokenizer = Encoder(settings).tokenizer  # whatever is wrong with it shows before any work
    given = asdict(settings.tokenizer)
    level = "sentence" if settings.split_sentences else "document"
    totals = Totals(prefixes=[f"{output_prefix}_{key}_{level}" for key in settings.keys])
    named = [v for k, v in given.items() if isinstance(v, str) and k.endswith(("file", "model"))]
    read = Reads([*files, *(file for path in named for file in files_in(path))])
    for output in [output_prefix + BAD_LINES, *(prefix + end for prefix in totals.prefixes for end in ENDINGS)]:
        check_file("--output-prefix", output, read)
    start = time.monotonic()
    with contextlib.ExitStack() as stack:
        dtype = token_dtype(tokenizer.vocab_size)
        writers = [stack.enter_context(IndexedWriter(prefix, dtype)) for prefix in totals.prefixes]
        rejected = stack.enter_context(RejectedLines(output_prefix))
        for encoded in encode_all(settings, blocks(files, pipes=True), workers):
            for writer, column in zip(writers, encoded.columns, strict=True):
                writer.add_documents(column.tokens, column.lengths, column.sequences)
                totals.tokens += len(column.tokens)
                totals.empty += column.empty
            totals.documents += encoded.documents
            totals.bad += len(encoded.bad)
            totals.size += encoded.size
            totals.seconds = time.monotonic() - start
            rejected.add(encoded.bad)
            longest = max(column.longest_part for column in encoded.columns)
            if longest > HUGE_PART >= totals.longest_part:
                print(f"note: {no_cut(longest, tokenizer.kind)}", file=sys.stderr)
            totals.longest_part = max(totals.longest_part, longest)
            if report is not None:
                report(totals)
        if not totals.documents:
            raise DataError(
                f"no documents in {', '.join(inputs)}" + (f": all {totals.bad} lines are bad" if totals.bad else "")
            )
        paths = {k: os.path.abspath(v) if isinstance(v, str) and k.endswith(("file", "model")) else v for k, v in given.items()}
        meta = dict(
            tokenizer=paths,
            tokenizer_type=tokenizer.kind,
            tokenizer_digest=tokenizer.digest(),
            vocab_size=tokenizer.vocab_size,
            eod=tokenizer.special.get("eod"),
            append_eod=settings.append_eod,
        )
        for writer in writers:
            writer.finish(meta)
        rejected.finish()
    return totals


def no_cut(characters: int, kind: str) -> str:
    """Return the words for a long text that the tokenizer was given at once."""
    return (
        f"a text of {characters} characters was tokenized at once, which takes up to 150 bytes of memory for each: it has no "
        f"place where {kind} could cut it without changing its tokens"
    )


class RejectedLines:
    """`PREFIX.bad.jsonl`: the lines that were skipped, as they were. Made only if there are any."""

    def __init__(self, prefix: str) -> None:
        self.path = Path(prefix + BAD_LINES)
        remove_leftovers(self.path)
        self._pending: PendingFile | None = None

    def add(self, lines: Iterable[tuple[str, bytes]]) -> None:
        """Keep these lines, each with the reason on standard error."""
        for reason, text in lines:
            if self._pending is None:
                self._pending = PendingFile(self.path)
            self._pending.file.write(text if text.endswith(b"\n") else text + b"\n")
            print(f"skipped {reason}", file=sys.stderr)

    def finish(self) -> None:
        """Put the file in place; one of an earlier run goes."""
        if self._pending is None:
            self.path.unlink(missing_ok=True)
        else:
            self._pending.commit()

    def __enter__(self) -> RejectedLines:
        return self

    def __exit__(self, *error: object) -> None:
        if self._pending is not None:
            self._pending.discard()
