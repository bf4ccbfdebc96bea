"""Settings of the tokenizer: text to token ids."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron.config.check import ConfigCheck, Rules, missing
from megatron.config.errors import Problem
from megatron.config.option import NOT_NEGATIVE, POSITIVE, option
from megatron.config.paths import reason_unreadable

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
    """Text to token ids."""

    tokenizer_type: str | None = option(
        None,
        "how text becomes tokens",
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
    vocab_file: str | None = option(None, "vocab.json of GPT-2 BPE, vocab.txt of BERT")
    merge_file: str | None = option(None, "merges.txt of GPT-2 BPE")
    tokenizer_model: str | None = option(None, "SentencePiece model; or a tokenizer.json or its directory")
    vocab_size: int | None = option(None, "number of ids, for NullTokenizer only", legal=POSITIVE)
    vocab_extra_ids: int = option(0, "additional <extra_id_N> tokens", legal=NOT_NEGATIVE)
    eod_token: str | None = option(None, "the token that ends a document, by its text or its id; default the tokenizer's own")
    bos_token: str | None = option(
        None, "the first token of a document, by its text or its id; preprocessing puts it before each"
    )


def tokenizer_given(c: ConfigCheck) -> Iterator[Problem]:
    """A run that no task describes needs a tokenizer."""
    yield from missing(c, ["tokenizer.tokenizer_type"])


def tokenizer_settings(c: ConfigCheck) -> Iterator[Problem]:
    """Each tokenizer needs its files, and only NullTokenizer its size."""
    kind = c["tokenizer.tokenizer_type"]
    if kind == "NullTokenizer" and c["tokenizer.vocab_size"] is None and "tokenizer.vocab_size" not in c.invalid:
        yield Problem(c.flag_text("tokenizer.tokenizer_type"), "needs `--vocab-size`, the number of ids")
    if c.planning:
        return
    for name in TOKENIZER_FILES.get(kind, ()):
        if c[name] is None:
            yield Problem(c.flag_text("tokenizer.tokenizer_type"), f"needs `{c.flag(name)}`")


def tokenizer_files(c: ConfigCheck) -> Iterator[Problem]:
    """The files of the chosen tokenizer are there."""
    kind = c["tokenizer.tokenizer_type"]
    for name in TOKENIZER_FILES.get(kind, ()):
        if c[name] is None:
            continue
        path = Path(c[name])
        if kind == "HuggingFaceTokenizer" and os.path.isdir(path):
            path = path / "tokenizer.json"
        if wrong := reason_unreadable(path, c.flag(name)):
            where = "" if str(path) == c[name] else f"{path} "
            yield Problem(c.flag_text(name), where + wrong)


RULES = Rules(every_run=(tokenizer_settings,), pretraining=(tokenizer_given,), disk=(tokenizer_files,))
