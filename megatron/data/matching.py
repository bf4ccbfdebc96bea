"""Check that datasets were made with a tokenizer: by the sidecar file, or without one by the token ids."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from megatron.config.schema import DataSettings, TokenizerConfig
from megatron.data.blend import parse_blend
from megatron.data.errors import DataError
from megatron.data.indexed import IndexedDataset, read_sidecar
from megatron.data.special_tokens import ROLE_FLAGS, describe_token
from megatron.data.tokenizer_base import PROBES, Tokenizer

MAX_CHECKED_TOKENS = 1 << 24  # tokens that are checked without a sidecar; in a larger dataset, in pieces spread over it
CHECKED_PIECE = 1 << 16
# Texts that equal tokenizers must tokenize alike: punctuation, numbers, accents, other scripts, special tokens.
PROBE_TEXTS = (
    *PROBES,
    "The quick brown fox jumps over the lazy dog.",
    "In the beginning, 1 + 1 was 2; isn't it still?",
    "ÀÉÎÕÜ naïve café — “quotes” … ½ № 株式会社 สวัสดี 👩‍👩‍👧 e\u0301",
    "a\u00a0b\u200bc\r\nd\x00e\ufffdf",
    "<s> </s> <unk> <pad> [CLS] [SEP] [MASK] <|endoftext|> <mask>",
    "",
    " ",
    "   \n\n\t ",
    "x" * 250,
)
ROLE_NAMES = {"eod": "the end of document", "bos": "the first token"}  # in messages; other roles have their own names


def check_tokenizer(dataset: IndexedDataset, tokenizer: Tokenizer) -> None:
    """Check that a dataset was made with this tokenizer.

    Raises:
        DataError: the sidecar names another tokenizer; or, without a sidecar, the tokenizer lacks some of the ids.
    """
    meta = dataset.meta()
    made_with = meta.get("tokenizer_digest")
    if made_with is None:
        check_ids(dataset, tokenizer.vocab_size)
    elif made_with != tokenizer.digest():
        if meta.get("vocabulary_digest") == tokenizer.vocabulary_digest() and isinstance(meta.get("special"), dict):
            raise DataError(_other_special_tokens(dataset.prefix, meta["special"], tokenizer))
        raise DataError(
            f"{dataset.prefix} was made with {meta.get('tokenizer_type')} ({made_with}, "
            f"{meta.get('vocab_size')} ids), but this run uses {tokenizer.kind} ({tokenizer.digest()}, "
            f"{tokenizer.vocab_size} ids); use the same tokenizer files, or preprocess the text again"
        )


def _other_special_tokens(prefix: str, there: Mapping[str, Any], tokenizer: Tokenizer) -> str:
    """Return the message for tokenizers that differ only in the roles of special tokens. there: the dataset's ids by role."""
    other = [role for role in {**there, **tokenizer.special} if there.get(role) != tokenizer.special.get(role)]
    here = {role: _named(tokenizer, tokenizer.special.get(role)) for role in other}
    words = [
        f"{ROLE_NAMES.get(role, role)} is {_named(tokenizer, there.get(role))} there and {here[role]} in this run"
        for role in other
    ]
    ways = [f"{ROLE_FLAGS[role]} {there[role]}" for role in other if role in ROLE_FLAGS and role in there]
    way = f"give {' '.join(ways)}" if len(ways) == len(other) else "use the tokenizer files that it was made with"
    return (
        f"{prefix} was made with a {tokenizer.kind} of the same vocabulary but other special tokens: {'; '.join(words)}; "
        f"{way}, or preprocess the text again"
    )


def _named(tokenizer: Tokenizer, number: object) -> str:
    return describe_token(tokenizer, number) if isinstance(number, int) else "none"


def check_ids(dataset: IndexedDataset, vocab_size: int) -> None:
    """Check that the ids of a dataset are in the vocabulary; for a large dataset, only some of them.

    Raises:
        DataError: an id is not; the message names file, document and token.
    """
    limits = np.iinfo(dataset.dtype)
    if limits.min >= 0 and limits.max < vocab_size:
        return  # the number format holds no wrong id
    for start in _starts(dataset.token_count):
        tokens = dataset.tokens[start : start + CHECKED_PIECE]
        if not len(tokens) or (int(tokens.max()) < vocab_size and int(tokens.min()) >= 0):
            continue
        place = start + int(((tokens < 0) | (tokens >= vocab_size)).argmax())
        # From the token to its sequence, and from that to its document, each by the last one that begins before it.
        sequence = int(np.searchsorted(dataset.offsets, place * dataset.dtype.itemsize, side="right")) - 1
        document = int(np.searchsorted(dataset.documents, sequence, side="right")) - 1
        token = place - int(dataset.offsets[sequence]) // dataset.dtype.itemsize
        first, end = dataset.documents[document : document + 2].tolist()
        sentence = f"sentence {sequence - first}, " if end - first > 1 else ""
        raise DataError(
            f"{dataset.bin_path}, document {document}, {sentence}token {token}: id {int(dataset.tokens[place])} is outside of "
            f"the vocabulary of {vocab_size} ids; the data was made with another tokenizer"
        )


def _starts(tokens: int) -> Iterator[int]:
    """Return the starts of the pieces to check: all of a small dataset, else some that are spread evenly over it."""
    if tokens <= MAX_CHECKED_TOKENS:
        return iter(range(0, tokens, CHECKED_PIECE))
    return iter(np.linspace(0, tokens - CHECKED_PIECE, MAX_CHECKED_TOKENS // CHECKED_PIECE).astype(np.int64).tolist())


def adopt_data_roles(data: DataSettings, given: TokenizerConfig, tokenizer: Tokenizer) -> tuple[TokenizerConfig, list[str]]:
    """Set a tokenizer's end-of-document and first token to those that were chosen by flags when the data were preprocessed.

    A flag of this run takes precedence over that of the preprocessing.

    Args:
        data: the data settings, which name the datasets.
        given: the settings of the tokenizer.
        tokenizer: the tokenizer, which is changed.

    Returns:
        The settings of the changed tokenizer, and a line for the user about each change.

    Raises:
        DataError: a sidecar cannot be read.
    """
    lines: list[str] = []
    for words in (data.data_path, data.train_data_path, data.valid_data_path, data.test_data_path):
        for prefix in parse_blend(words)[0] if words else ():
            for role, number in _chosen(prefix, tokenizer):
                if getattr(given, f"{role}_token") is None:
                    tokenizer.choose(role, number)
                    eod = role == "eod"
                    given = replace(given, eod_token=str(number)) if eod else replace(given, bos_token=str(number))
                    flag = ROLE_FLAGS[role]
                    lines.append(
                        f"{ROLE_NAMES[role]} is {describe_token(tokenizer, number)}, as {flag} said when {prefix} was made"
                    )
    return given, lines


def _chosen(prefix: str, tokenizer: Tokenizer) -> Sequence[tuple[str, int]]:
    """Return roles and tokens that were chosen by flags when the dataset was made, if it has the tokenizer's vocabulary."""
    meta = read_sidecar(prefix.removesuffix(".bin").removesuffix(".idx"))
    chosen = meta.get("chosen")
    if not isinstance(chosen, dict) or meta.get("vocabulary_digest") != tokenizer.vocabulary_digest():
        return []
    return [(r, n) for r, n in chosen.items() if r in ROLE_FLAGS and type(n) is int and 0 <= n < tokenizer.vocab_size]


def same_ids(one: Tokenizer, other: Tokenizer) -> bool:
    """Return whether two tokenizers have the same vocabulary, and tokenize the probe texts alike."""
    return (
        one.vocab_size == other.vocab_size
        and all(one.piece(number) == other.piece(number) for number in range(one.vocab_size))
        and all(one.tokenize(text) == other.tokenize(text) for text in PROBE_TEXTS)
    )
