"""A corpus of JSON lines to indexed datasets, with any number of processes.

Blocks of lines go to the workers and come back as token ids, which one process writes in the order of the input. So the
output does not depend on the number of workers, and the memory in use does not grow with the corpus.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import signal
import sys
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
from megatron.data.sentences import split_sentences
from megatron.data.tokenizer import Tokenizer, build_tokenizer
from megatron.files.outputs import Reads, check_file, files_in
from megatron.files.pending import PendingFile, remove_leftovers

BAD_LINES = ".bad.jsonl"


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
    """What one block gives for one key: all tokens, tokens of each sequence, sequences of each document."""

    tokens: NDArray[Any]
    lengths: NDArray[np.int64]
    sequences: NDArray[np.int64]
    empty: int


@dataclass
class Encoded:
    """One block of lines after tokenization. size: bytes of JSON. bad: skipped lines with the reason."""

    columns: list[Column]
    documents: int
    size: int
    bad: list[tuple[str, bytes]] = field(default_factory=list)


@dataclass
class Totals:
    """What a run did. size: bytes of JSON read. seconds: since the first block was asked for."""

    documents: int = 0
    tokens: int = 0
    empty: int = 0
    bad: int = 0
    size: int = 0
    seconds: float = 0.0
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
        if self.settings.split_sentences:
            parts = [split_sentences(text, self.settings.keep_newlines) for text in texts]
        else:
            parts = [[text] for text in texts]
        flat = iter(self.tokenizer.tokenize_many([part for document in parts for part in document]))
        tokens: list[int] = []
        lengths: list[int] = []
        sequences: list[int] = []
        for document in parts:
            ids = [found for found in (next(flat) for _ in document) if found]
            if ids and self.eod is not None:
                ids[-1].append(self.eod)
            for sequence in ids:
                tokens += sequence
                lengths.append(len(sequence))
            sequences.append(len(ids))
        array = np.array(tokens, dtype=np.int64)
        if len(array) and int(array.max()) >= self.tokenizer.vocab_size:
            raise DataError(f"the tokenizer gave id {int(array.max())}, but has {self.tokenizer.vocab_size} ids")
        return Column(array.astype(self.dtype), np.array(lengths, np.int64), np.array(sequences, np.int64), sequences.count(0))


def start_worker() -> None:
    """Called first in each worker process. An interrupt is the parent's business."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process per core is parallel enough


@functools.lru_cache(maxsize=1)
def encoder_of(settings: Settings) -> Encoder:
    """The encoder of this process, built with its first block."""
    return Encoder(settings)


def encode_block(settings: Settings, lines: list[Line]) -> Encoded:
    """What a worker process does with a block."""
    return encoder_of(settings)(lines)


def encode_all(settings: Settings, source: Iterable[list[Line]], workers: int) -> Iterator[Encoded]:
    """Every block encoded, in order; at most four blocks per worker are under way."""
    if workers <= 1:
        yield from map(Encoder(settings), source)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=start_worker) as pool:
        waiting: deque[Future[Encoded]] = deque()
        try:
            for lines in source:
                waiting.append(pool.submit(encode_block, settings, lines))
                if len(waiting) >= 4 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
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
        for encoded in encode_all(settings, blocks(files), workers):
            for writer, column in zip(writers, encoded.columns, strict=True):
                writer.add_documents(column.tokens, column.lengths, column.sequences)
                totals.tokens += len(column.tokens)
                totals.empty += column.empty
            totals.documents += encoded.documents
            totals.bad += len(encoded.bad)
            totals.size += encoded.size
            totals.seconds = time.monotonic() - start
            rejected.add(encoded.bad)
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
