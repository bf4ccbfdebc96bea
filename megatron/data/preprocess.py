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
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron.config.schema import TokenizerConfig
from megatron.data.columns import ColumnBuilder, TokenColumn
from megatron.data.corpus import BadLine, Line, check_keys, expand_globs, parse_line, read_blocks
from megatron.data.errors import DataError
from megatron.data.indexed import DATASET_SUFFIXES, IndexedWriter, token_dtype
from megatron.data.sentences import split_sentences
from megatron.data.special_tokens import SpecialTokenCounter, describe_document_tokens, describe_special_tokens
from megatron.data.tokenizer import Tokenizer, build_tokenizer
from megatron.files.outputs import Reads, check_file, files_in
from megatron.files.pending import PendingFile, remove_leftovers

BAD_LINES = ".bad.jsonl"

BATCH_CHARACTERS = 1 << 20  # of text that is tokenized at once
MAX_QUEUED_BYTES = 1 << 24  # of JSON that is under way, for each worker
MAX_QUIET_PART = 1 << 24  # characters that are worth a word when they cannot be cut


@dataclass(frozen=True)
class PreprocessConfig:
    """What is made of each line. keys: of the JSON objects, each its own dataset. plain_special_tokens: those that stand in a
    text are text like any other."""

    tokenizer: TokenizerConfig
    keys: tuple[str, ...] = ("text",)
    append_eod: bool = False
    plain_special_tokens: bool = False
    split_sentences: bool = False
    keep_newlines: bool = False
    skip_bad_lines: bool = False


@dataclass
class EncodedBlock:
    """One block of lines after tokenization. size: bytes of JSON. bad: skipped lines with the reason. special_tokens: how often
    which one stands in the texts."""

    columns: list[TokenColumn]
    documents: int
    size: int
    bad: list[tuple[str, bytes]] = field(default_factory=list)
    special_tokens: Counter[str] = field(default_factory=Counter)

    @property
    def longest_part(self) -> int:
        """Characters of the longest text that the tokenizer was given at once."""
        return max(column.longest_part for column in self.columns)


@dataclass
class PreprocessTotals:
    """Counts of a whole run, to report while it goes on and at its end.

    size: bytes of JSON read. seconds: since the first block was asked for. longest_part: as in `TokenColumn`. special_tokens:
    as in `EncodedBlock`.
    """

    documents: int = 0
    tokens: int = 0
    empty: int = 0
    bad: int = 0
    size: int = 0
    seconds: float = 0.0
    longest_part: int = 0
    prefixes: list[str] = field(default_factory=list)
    special_tokens: Counter[str] = field(default_factory=Counter)

    def add(self, block: EncodedBlock) -> None:
        """Count a block in."""
        self.documents += block.documents
        self.tokens += sum(len(column.tokens) for column in block.columns)
        self.empty += sum(column.empty for column in block.columns)
        self.bad += len(block.bad)
        self.size += block.size
        self.longest_part = max(self.longest_part, block.longest_part)
        self.special_tokens += block.special_tokens


class UnreadableTexts(Exception):
    """Texts that the tokenizer gives up on. reasons: why, by the number of the document among those to be tokenized."""

    def __init__(self, reasons: Mapping[int, str]) -> None:
        super().__init__()
        self.reasons = reasons


class Encoder:
    """Lines to token ids."""

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
        """Raises DataError for a bad line, unless those are to be skipped."""
        good: list[tuple[Line, list[str]]] = []
        bad: list[tuple[str, bytes]] = []
        for line in lines:
            try:
                good.append((line, parse_line(line, self.settings.keys)))
            except BadLine as error:
                self._reject(line, error, bad)
        while True:
            try:
                columns = [self.column([texts[i] for _, texts in good]) for i in range(len(self.settings.keys))]
                break
            except UnreadableTexts as error:
                for number, why in error.reasons.items():
                    line = good[number][0]
                    self._reject(line, BadLine(f"{line.file}:{line.number}: {why}"), bad)
                good = [row for number, row in enumerate(good) if number not in error.reasons]
        met = self._special(text for _, texts in good for text in texts)
        return EncodedBlock(columns, len(good), sum(len(line.text) for line in lines), bad, met)

    def _reject(self, line: Line, error: BadLine, bad: list[tuple[str, bytes]]) -> None:
        if not self.settings.skip_bad_lines:
            raise DataError(f"{error}; --on-bad-line=skip goes on without such lines") from error
        bad.append((str(error), line.text))

    def column(self, texts: Sequence[str]) -> TokenColumn:
        """The texts of one key. A document without tokens has no sequence, and gets neither a first token nor an end.

        UnreadableTexts for those that the tokenizer gives up on, all at once: a block may hold many.
        """
        try:
            return self._column(texts)
        except DataError:
            reasons = {number: why for number, text in enumerate(texts) if (why := self._refusal(text))}
            if reasons:
                raise UnreadableTexts(reasons) from None
            raise

    def _refusal(self, text: str) -> str | None:
        """Why the tokenizer gives up on a text; None where it does not."""
        try:
            self.tokenizer.tokenize_many([part for *_, part in self.parts([text])])
        except DataError as error:
            return str(error)
        return None

    def _column(self, texts: Sequence[str]) -> TokenColumn:
        column = ColumnBuilder(len(texts), self.begins, self.ends, self.dtype)
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
            whole = split_sentences(text, keep) if self.settings.split_sentences else (text,)
            yield from ((document, number, part) for number, seq in enumerate(whole) for part in self.tokenizer.parts(seq))

    def append(self, parts: Sequence[tuple[int, int, str]], column: ColumnBuilder) -> None:
        """Tokenize parts of texts and append their tokens. DataError for an id that the tokenizer says it does not have."""
        for (document, sequence, _), ids in zip(parts, self.tokenizer.tokenize_many([p[2] for p in parts]), strict=True):
            if ids and max(ids) >= self.tokenizer.vocab_size:
                raise DataError(f"the tokenizer gave id {max(ids)}, but has {self.tokenizer.vocab_size} ids")
            column.append(document, sequence, ids)


def init_worker() -> None:
    """Called first in each worker process. An interrupt is the parent's business."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=exit_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process per core is parallel enough


def exit_with_parent() -> None:
    """End this worker when its parent is killed: the pool's workers hold both ends of its pipe, and would wait for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@functools.lru_cache(maxsize=1)
def process_encoder(settings: PreprocessConfig) -> Encoder:
    """The encoder of this process, built with its first block."""
    return Encoder(settings)


def encode_block(settings: PreprocessConfig, lines: list[Line]) -> EncodedBlock:
    """What a worker process does with a block."""
    return process_encoder(settings)(lines)


def encode_blocks(settings: PreprocessConfig, source: Iterable[list[Line]], workers: int) -> Iterator[EncodedBlock]:
    """Every block encoded, in order. At most four blocks per worker are under way, and fewer where documents are long."""
    if workers <= 1:
        yield from map(Encoder(settings), source)
        return
    context = multiprocessing.get_context("spawn")
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


def preprocess(
    inputs: Sequence[str],
    output_prefix: str,
    settings: PreprocessConfig,
    workers: int = 1,
    report: Callable[[PreprocessTotals], None] | None = None,
    say: Callable[[str], object] = str,
) -> PreprocessTotals:
    """Write `PREFIX_KEY_document.bin/.idx` (or `_sentence`) for each key, with a sidecar that names the tokenizer.

    Nothing is left behind, and older outputs stay as they were, if this fails or is interrupted.

    Args:
        inputs: files and globs.
        output_prefix: PREFIX. Bad lines that are skipped go to `PREFIX.bad.jsonl`.
        settings: what is made of each line.
        workers: processes; the output is the same for any number.
        report: called after each block.
        say: told, a line at a time, what documents begin and end with, and of special tokens in their texts.

    Raises:
        DataError: for wrong input, also for documents without a single token.
    """
    check_keys(settings.keys)
    files = expand_globs(inputs)
    tokenizer = Encoder(settings).tokenizer  # whatever is wrong with it shows before any work
    level = "sentence" if settings.split_sentences else "document"
    totals = PreprocessTotals(prefixes=[f"{output_prefix}_{key}_{level}" for key in settings.keys])
    _check_outputs(
        [output_prefix + BAD_LINES, *(prefix + end for prefix in totals.prefixes for end in DATASET_SUFFIXES)], files, settings
    )
    for line in describe_document_tokens(tokenizer, settings.tokenizer, append_eod=settings.append_eod):
        say(line)
    start = time.monotonic()
    with contextlib.ExitStack() as stack:
        dtype = token_dtype(tokenizer.vocab_size)
        writers = [stack.enter_context(IndexedWriter(prefix, dtype)) for prefix in totals.prefixes]
        rejected = stack.enter_context(RejectedLines(output_prefix))
        for encoded in encode_blocks(settings, read_blocks(files, pipes=True), workers):
            for writer, column in zip(writers, encoded.columns, strict=True):
                writer.add_documents(column.tokens, column.lengths, column.sequences)
            rejected.add(encoded.bad)
            if encoded.longest_part > MAX_QUIET_PART >= totals.longest_part:
                print(f"note: {uncut_text_note(encoded.longest_part, tokenizer.kind)}", file=sys.stderr)
            totals.add(encoded)
            totals.seconds = time.monotonic() - start
            if report is not None:
                report(totals)
        _refuse_nothing(inputs, settings, totals, [writer.token_count for writer in writers])
        meta = sidecar_entries(tokenizer, settings)
        for writer in writers:
            writer.finish(meta)
        rejected.finish()
    say(describe_special_tokens(tokenizer, totals.special_tokens, plain=settings.plain_special_tokens))
    return totals


def _named_files(tokenizer: TokenizerConfig) -> dict[str, str]:
    """The settings of a tokenizer that name files."""
    return {k: v for k, v in asdict(tokenizer).items() if isinstance(v, str) and k.endswith(("file", "model"))}


def _check_outputs(outputs: Iterable[str], inputs: Iterable[str], settings: PreprocessConfig) -> None:
    """BadOutput for an output that would replace something else, or a file that is read here."""
    read = Reads([*inputs, *(file for path in _named_files(settings.tokenizer).values() for file in files_in(path))])
    for output in outputs:
        check_file("--output-prefix", output, read)


def _refuse_nothing(inputs: Sequence[str], settings: PreprocessConfig, totals: PreprocessTotals, tokens: Sequence[int]) -> None:
    """DataError where there are no documents, or no tokens in those of a key: nothing could be trained on them."""
    if not totals.documents:
        why = f": all {totals.bad} lines are bad" if totals.bad else ""
        raise DataError(f"no documents in {', '.join(inputs)}{why}")
    for key, count in zip(settings.keys, tokens, strict=True):
        if not count:
            texts = f"the texts under the key {key!r} of all {totals.documents} documents are empty"
            raise DataError(f"no tokens in {', '.join(inputs)}: {texts}; name another key with --json-keys, or other files")


def sidecar_entries(tokenizer: Tokenizer, settings: PreprocessConfig) -> dict[str, Any]:
    """Return what `PREFIX.meta.json` says of how the tokens were made."""
    files = {name: os.path.abspath(path) for name, path in _named_files(settings.tokenizer).items()}
    return dict(
        tokenizer={**asdict(settings.tokenizer), **files},
        tokenizer_type=tokenizer.kind,
        tokenizer_digest=tokenizer.digest(),
        vocabulary_digest=tokenizer.vocabulary_digest(),
        vocab_size=tokenizer.vocab_size,
        special=dict(tokenizer.special),
        chosen=dict(tokenizer.chosen),
        eod=tokenizer.special.get("eod"),
        append_eod=settings.append_eod,
        prepend_bos=settings.tokenizer.bos_token is not None,
        special_tokens_in_text="plain" if settings.plain_special_tokens else "ids",
    )


def uncut_text_note(characters: int, kind: str) -> str:
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
