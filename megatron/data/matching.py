"""Check that datasets were made with a given tokenizer: by the sidecar file or, without one, by the token ids."""

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

MAX_CHECKED_TOKENS = 1 << 24  # tokens to check without a sidecar; of a larger dataset, pieces spread over it are checked
CHECKED_PIECE = 1 << 16  # tokens of one of these pieces
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
ROLE_NAMES = {"eod": "the end of document", "bos": "the first token"}  # in messages; other roles appear under their own names


def check_tokenizer(dataset: IndexedDataset, tokenizer: Tokenizer) -> None:
    """Check that a dataset was made with this tokenizer.

    Raises:
        DataError: the sidecar names another tokenizer, or, without a sidecar, some ids are outside the vocabulary.
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


def _other_special_tokens(prefix: str, dataset_ids: Mapping[str, Any], tokenizer: Tokenizer) -> str:
    """Return the message for tokenizers that differ only in the roles of special tokens.

    dataset_ids: ids of the special tokens that the dataset was made with, by role.
    """
    run_ids = tokenizer.special
    roles = [role for role in {**dataset_ids, **run_ids} if dataset_ids.get(role) != run_ids.get(role)]
    differences = [
        f"{ROLE_NAMES.get(role, role)} is {_token_name(tokenizer, dataset_ids.get(role))} in the dataset and "
        f"{_token_name(tokenizer, run_ids.get(role))} in this run"
        for role in roles
    ]
    flags = [f"{ROLE_FLAGS[role]} {dataset_ids[role]}" for role in roles if role in ROLE_FLAGS and role in dataset_ids]
    advice = f"give {' '.join(flags)}" if len(flags) == len(roles) else "use the tokenizer files that it was made with"
    return (
        f"{prefix} was made with a {tokenizer.kind} of the same vocabulary but other special tokens: "
        f"{'; '.join(differences)}; {advice}, or preprocess the text again"
    )


def _token_name(tokenizer: Tokenizer, token_id: object) -> str:
    """Return the description of a token for messages; "none" if there is no id."""
    return describe_token(tokenizer, token_id) if isinstance(token_id, int) else "none"


def check_ids(dataset: IndexedDataset, vocab_size: int) -> None:
    """Check that the ids of a dataset are in the vocabulary; for a large dataset, only some of them.

    Raises:
        DataError: an id is outside the vocabulary; the message names file, document and token.
    """
    limits = np.iinfo(dataset.dtype)
    if limits.min >= 0 and limits.max < vocab_size:
        return  # every value of the number format is in the vocabulary
    for start in _piece_starts(dataset.token_count):
        tokens = dataset.tokens[start : start + CHECKED_PIECE]
        if not len(tokens) or (int(tokens.max()) < vocab_size and int(tokens.min()) >= 0):
            continue
        token_index = start + int(((tokens < 0) | (tokens >= vocab_size)).argmax())
        # The token's sequence is the last one that begins at or before it, and so is the sequence's document.
        sequence = int(np.searchsorted(dataset.offsets, token_index * dataset.dtype.itemsize, side="right")) - 1
        document = int(np.searchsorted(dataset.documents, sequence, side="right")) - 1
        token = token_index - int(dataset.offsets[sequence]) // dataset.dtype.itemsize
        first, end = dataset.documents[document : document + 2].tolist()
        sentence = f"sentence {sequence - first}, " if end - first > 1 else ""
        token_id = int(dataset.tokens[token_index])
        raise DataError(
            f"{dataset.bin_path}, document {document}, {sentence}token {token}: id {token_id} is outside of the "
            f"vocabulary of {vocab_size} ids; the data was made with another tokenizer"
        )


def _piece_starts(tokens: int) -> Iterator[int]:
    """Return the starts of the pieces to check: all of a small dataset, else some that are spread evenly over it."""
    if tokens <= MAX_CHECKED_TOKENS:
        return iter(range(0, tokens, CHECKED_PIECE))
    return iter(np.linspace(0, tokens - CHECKED_PIECE, MAX_CHECKED_TOKENS // CHECKED_PIECE).astype(np.int64).tolist())


def adopt_dataset_roles(data: DataSettings, config: TokenizerConfig, tokenizer: Tokenizer) -> tuple[TokenizerConfig, list[str]]:
    """Give a tokenizer the end-of-document and first token that flags chose when the datasets were preprocessed.

    A flag of this run takes precedence.

    Args:
        data: the data settings, which name the datasets.
        config: the settings of the tokenizer.
        tokenizer: the tokenizer, which is modified.

    Returns:
        The settings of the modified tokenizer, and a line for the user about each change.

    Raises:
        DataError: a sidecar cannot be read.
    """
    lines: list[str] = []
    for paths in (data.data_path, data.train_data_path, data.valid_data_path, data.test_data_path):
        for prefix in parse_blend(paths)[0] if paths else ():
            for role, token_id in _chosen_roles(prefix, tokenizer):
                if getattr(config, f"{role}_token") is None:
                    tokenizer.choose(role, token_id)
                    is_eod = role == "eod"
                    config = replace(config, eod_token=str(token_id)) if is_eod else replace(config, bos_token=str(token_id))
                    token = describe_token(tokenizer, token_id)
                    lines.append(
                        f"{ROLE_NAMES[role]} is {token}, as chosen by {ROLE_FLAGS[role]} when {prefix} was preprocessed"
                    )
    return config, lines


def _chosen_roles(prefix: str, tokenizer: Tokenizer) -> Sequence[tuple[str, int]]:
    """Return the roles and ids that flags chose when the dataset was made; none if it has another vocabulary."""
    meta = read_sidecar(prefix.removesuffix(".bin").removesuffix(".idx"))
    chosen = meta.get("chosen")
    if not isinstance(chosen, dict) or meta.get("vocabulary_digest") != tokenizer.vocabulary_digest():
        return []
    return [(role, i) for role, i in chosen.items() if role in ROLE_FLAGS and type(i) is int and 0 <= i < tokenizer.vocab_size]


def same_ids(one: Tokenizer, other: Tokenizer) -> bool:
    """Return whether two tokenizers have the same vocabulary, and tokenize the probe texts alike."""
    return (
        one.vocab_size == other.vocab_size
        and all(one.piece(token_id) == other.piece(token_id) for token_id in range(one.vocab_size))
        and all(one.tokenize(text) == other.tokenize(text) for text in PROBE_TEXTS)
    )
