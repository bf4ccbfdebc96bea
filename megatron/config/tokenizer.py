"""Settings of the tokenizer, which converts text to token ids."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron.config.check import ConfigCheck, Rules, missing
from megatron.config.errors import Problem
from megatron.config.option import NOT_NEGATIVE, POSITIVE, option
from megatron.config.paths import reason_unreadable

# Settings that name the files of each type of tokenizer. Types that are not listed have no files.
TOKENIZER_FILES = {
    "GPT2BPETokenizer": ("tokenizer.vocab_file", "tokenizer.merge_file"),
    "BertWordPieceLowerCase": ("tokenizer.vocab_file",),
    "BertWordPieceCase": ("tokenizer.vocab_file",),
    "SentencePieceTokenizer": ("tokenizer.tokenizer_model",),
    "GPTSentencePieceTokenizer": ("tokenizer.tokenizer_model",),
    "HuggingFaceTokenizer": ("tokenizer.tokenizer_model",),
}


@dataclass(frozen=True)
class TokenizerConfig:
    """Tokenizer, which converts text to token ids."""

    tokenizer_type: str | None = option(
        None,
        "type of tokenizer",
        choices=(
            "GPT2BPETokenizer",
            "BertWordPieceLowerCase",
            "BertWordPieceCase",
            "SentencePieceTokenizer",
            "GPTSentencePieceTokenizer",
            "HuggingFaceTokenizer",
            "ByteTokenizer",
            "NullTokenizer",
        ),
    )
    vocab_file: str | None = option(None, "vocabulary file: vocab.json for GPT-2 BPE, vocab.txt for BERT WordPiece")
    merge_file: str | None = option(None, "merges file: merges.txt for GPT-2 BPE")
    tokenizer_model: str | None = option(
        None, "SentencePiece model file, or a tokenizer.json or its directory for HuggingFaceTokenizer"
    )
    vocab_size: int | None = option(None, "number of token ids, for NullTokenizer only", legal=POSITIVE)
    vocab_extra_ids: int = option(0, "number of sentinel tokens <extra_id_N> to add", legal=NOT_NEGATIVE)
    eod_token: str | None = option(None, "token that ends a document, as text or id (default: the tokenizer's own)")
    bos_token: str | None = option(None, "token that preprocessing puts before each document, as text or id (default: none)")


def tokenizer_given(c: ConfigCheck) -> Iterator[Problem]:
    """Pretraining needs a tokenizer; a task uses that of its checkpoint."""
    yield from missing(c, ["tokenizer.tokenizer_type"])


def tokenizer_settings(c: ConfigCheck) -> Iterator[Problem]:
    """Each type of tokenizer needs its files, and NullTokenizer needs the number of token ids."""
    kind = c["tokenizer.tokenizer_type"]
    if kind == "NullTokenizer" and c["tokenizer.vocab_size"] is None and "tokenizer.vocab_size" not in c.invalid:
        yield Problem(c.flag_text("tokenizer.tokenizer_type"), "needs `--vocab-size`, the number of ids")
    if c.planning:  # `cli.dry_run` checks the files itself: it knows GPT-2's vocabulary size without them
        return
    for name in TOKENIZER_FILES.get(kind, ()):
        if c[name] is None:
            yield Problem(c.flag_text("tokenizer.tokenizer_type"), f"needs `{c.flag(name)}`")


def tokenizer_files(c: ConfigCheck) -> Iterator[Problem]:
    """The files of the tokenizer can be read."""
    kind = c["tokenizer.tokenizer_type"]
    for name in TOKENIZER_FILES.get(kind, ()):
        if c[name] is None:
            continue
        path = Path(c[name])
        if kind == "HuggingFaceTokenizer" and os.path.isdir(path):  # as Transformers saves a tokenizer
            path = path / "tokenizer.json"
        if reason := reason_unreadable(path, c.flag(name)):
            subject = "" if str(path) == c[name] else f"{path} "
            yield Problem(c.flag_text(name), subject + reason)


RULES = Rules(every_run=(tokenizer_settings,), pretraining=(tokenizer_given,), disk=(tokenizer_files,))
