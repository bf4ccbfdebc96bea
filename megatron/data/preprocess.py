"""Preprocess a corpus of JSON lines into indexed datasets: `encode.py` encodes the lines, one process writes them in order."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron.config.schema import TokenizerConfig
from megatron.data.corpus import check_keys, expand_globs, read_blocks
from megatron.data.encode import EncodedBlock, Encoder, PreprocessConfig, encode_blocks
from megatron.data.errors import DataError
from megatron.data.indexed import DATASET_SUFFIXES, IndexedWriter, token_dtype
from megatron.data.special_tokens import describe_document_tokens, describe_special_tokens
from megatron.data.tokenizer import Tokenizer
from megatron.files.outputs import InputPaths, check_file, files_in
from megatron.files.pending import PendingFile, remove_leftovers

BAD_LINES = ".bad.jsonl"
UNCUT_NOTE_THRESHOLD = 1 << 24  # characters; `uncut_text_note` is printed if a longer text was tokenized at once


@dataclass
class PreprocessTotals:
    """Counts of a preprocessing run, for progress reports and the final one.

    Attributes:
        documents: number of documents.
        tokens: number of tokens, of all keys.
        empty: number of texts without tokens.
        bad: number of skipped lines.
        size: bytes of JSON read.
        seconds: time since the first block was requested.
        longest_part: as in `TokenColumn`.
        prefixes: the datasets, one for each key.
        special_tokens: as in `EncodedBlock`.
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
        """Add the counts of a block."""
        self.documents += block.documents
        self.tokens += sum(len(column.tokens) for column in block.columns)
        self.empty += sum(column.empty for column in block.columns)
        self.bad += len(block.bad)
        self.size += block.size
        self.longest_part = max(self.longest_part, block.longest_part)
        self.special_tokens += block.special_tokens


def preprocess(
    inputs: Sequence[str],
    output_prefix: str,
    settings: PreprocessConfig,
    workers: int = 1,
    on_progress: Callable[[PreprocessTotals], None] | None = None,
    log: Callable[[str], object] = lambda line: None,
) -> PreprocessTotals:
    """Write `PREFIX_KEY_document.bin/.idx` (or `_sentence`) for each key, with a sidecar that names the tokenizer.

    Older outputs are not changed before all input is encoded. Temporary files are removed, unless the process is killed.

    Args:
        inputs: names and globs of the input files.
        output_prefix: PREFIX. Skipped lines are written to `PREFIX.bad.jsonl`.
        settings: settings of preprocessing.
        workers: number of processes; the output does not depend on it.
        on_progress: called after each block.
        log: called with each line of text about BOS tokens, EOD tokens and special tokens in texts.

    Raises:
        DataError: if the input is invalid, or has no tokens under one of the keys.
        OutputError: if an output is a directory, is a file that the command reads, or cannot be written.
    """
    check_keys(settings.keys)
    files = expand_globs(inputs)
    tokenizer = Encoder(settings).tokenizer  # built first, so that its errors are raised before any work
    level = "sentence" if settings.split_sentences else "document"
    totals = PreprocessTotals(prefixes=[f"{output_prefix}_{key}_{level}" for key in settings.keys])
    _check_outputs(
        [output_prefix + BAD_LINES, *(prefix + end for prefix in totals.prefixes for end in DATASET_SUFFIXES)], files, settings
    )
    for line in describe_document_tokens(tokenizer, settings.tokenizer, append_eod=settings.append_eod):
        log(line)
    start = time.monotonic()
    with contextlib.ExitStack() as stack:
        dtype = token_dtype(tokenizer.vocab_size)
        writers = [stack.enter_context(IndexedWriter(prefix, dtype)) for prefix in totals.prefixes]
        rejected = stack.enter_context(RejectedLines(output_prefix))
        for encoded in encode_blocks(settings, read_blocks(files, pipes=True), workers):
            for writer, column in zip(writers, encoded.columns, strict=True):
                writer.add_documents(column.tokens, column.lengths, column.sequences)
            rejected.add(encoded.bad)
            if encoded.longest_part > UNCUT_NOTE_THRESHOLD >= totals.longest_part:
                print(f"note: {uncut_text_note(encoded.longest_part, tokenizer.kind)}", file=sys.stderr)
            totals.add(encoded)
            totals.seconds = time.monotonic() - start
            if on_progress is not None:
                on_progress(totals)
        _check_not_empty(inputs, settings, totals, [writer.token_count for writer in writers])
        meta = sidecar_entries(tokenizer, settings)
        for writer in writers:
            writer.finish(meta)
        rejected.finish()
    log(describe_special_tokens(tokenizer, totals.special_tokens, plain=settings.plain_special_tokens))
    return totals


def _named_files(tokenizer: TokenizerConfig) -> dict[str, str]:
    """Return the settings of a tokenizer whose values are file names."""
    return {
        name: value for name, value in asdict(tokenizer).items() if isinstance(value, str) and name.endswith(("file", "model"))
    }


def _check_outputs(outputs: Iterable[str], inputs: Iterable[str], settings: PreprocessConfig) -> None:
    """Raise an OutputError if an output is a directory, an input or a tokenizer's file, or cannot be written."""
    tokenizer_files = (file for path in _named_files(settings.tokenizer).values() for file in files_in(path))
    input_files = InputPaths([*inputs, *tokenizer_files])
    for output in outputs:
        check_file("--output-prefix", output, input_files)


def _check_not_empty(
    inputs: Sequence[str], settings: PreprocessConfig, totals: PreprocessTotals, token_counts: Sequence[int]
) -> None:
    """Raise a DataError if there are no documents, or no tokens under one of the keys."""
    if not totals.documents:
        reason = f": all {totals.bad} lines are bad" if totals.bad else ""
        raise DataError(f"no documents in {', '.join(inputs)}{reason}")
    for key, count in zip(settings.keys, token_counts, strict=True):
        if not count:
            problem = f"the texts under the key {key!r} of all {totals.documents} documents are empty"
            raise DataError(f"no tokens in {', '.join(inputs)}: {problem}; name another key with --json-keys, or other files")


def sidecar_entries(tokenizer: Tokenizer, settings: PreprocessConfig) -> dict[str, Any]:
    """Return the entries of `PREFIX.meta.json` about how the tokens were made."""
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
    """Return the note about a long text that was tokenized at once."""
    return (
        f"a text of {characters} characters was tokenized at once, which takes up to 150 bytes of memory for each: it has no "
        f"place where {kind} could cut it without changing its tokens"
    )


class RejectedLines:
    """Writes skipped lines unchanged to `PREFIX.bad.jsonl`, which is created only if there are any."""

    def __init__(self, prefix: str) -> None:
        self.path = Path(prefix + BAD_LINES)
        remove_leftovers(self.path)
        self._pending: PendingFile | None = None

    def add(self, lines: Iterable[tuple[str, bytes]]) -> None:
        """Write lines to the file, and the reason why each was skipped to standard error."""
        for reason, text in lines:
            if self._pending is None:
                self._pending = PendingFile(self.path)
            self._pending.file.write(text if text.endswith(b"\n") else text + b"\n")
            print(f"skipped {reason}", file=sys.stderr)

    def finish(self) -> None:
        """Rename the file into place; if no line was skipped, remove the file of an earlier run."""
        if self._pending is None:
            self.path.unlink(missing_ok=True)
        else:
            self._pending.commit()

    def __enter__(self) -> RejectedLines:
        return self

    def __exit__(self, *error: object) -> None:
        if self._pending is not None:
            self._pending.discard()
