"""Read the tokenizer of a Hugging Face directory, from the files that transformers reads: tokenizer.json or older formats.

Older directories contain `vocab.json` and `merges.txt` (GPT-2), `vocab.txt` (BERT) or `tokenizer.model` (SentencePiece), with
added tokens in `added_tokens.json`, `special_tokens_map.json` and `tokenizer_config.json`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tokenizers import AddedToken, pre_tokenizers
from tokenizers import Tokenizer as Backend

from megatron.data.errors import DataError
from megatron.data.fast_tokenizers import GPT2BPETokenizer, HuggingFaceTokenizer, read_word_pieces, word_piece_backend
from megatron.data.sentence_piece import GPTSentencePieceTokenizer
from megatron.data.tokenizer_base import END_OF_TEXT, Tokenizer, read_tokenizer_file
from megatron.files.regular import parse_json

# Each of these is a tokenizer; the first one that exists is read.
VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model")
ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
# Special tokens that transformers' classes assume if the files name none.
GPT2_ROLES = {"bos": END_OF_TEXT, "eos": END_OF_TEXT, "unk": END_OF_TEXT}
BERT_ROLES = {"unk": "[UNK]", "sep": "[SEP]", "pad": "[PAD]", "cls": "[CLS]", "mask": "[MASK]"}


def has_hf_tokenizer(directory: Path) -> bool:
    """Return whether a Hugging Face directory contains a vocabulary file."""
    return any(os.path.lexists(directory / name) for name in VOCABULARIES)


def read_hf_tokenizer(directory: Path) -> Tokenizer | None:
    """Return the tokenizer of a Hugging Face directory; None if it has no known files, DataError if they are damaged."""
    vocabulary = next((name for name in VOCABULARIES if os.path.lexists(directory / name)), None)
    config = _read_config(directory)
    match vocabulary:
        case "tokenizer.json":
            return HuggingFaceTokenizer(str(directory))
        case "vocab.json" if os.path.lexists(directory / "merges.txt"):
            gpt2 = GPT2BPETokenizer(str(directory / "vocab.json"), str(directory / "merges.txt"))
            backend = gpt2.backend()
            backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(config.get("add_prefix_space", False)))
            return _with_added_tokens(backend, config, GPT2_ROLES)
        case "vocab.txt":
            backend = word_piece_backend(
                read_word_pieces(str(directory / "vocab.txt"), "vocab.txt"),
                lower_case=bool(config.get("do_lower_case", True)),
                strip_accents=config.get("strip_accents"),
                chinese_characters=bool(config.get("tokenize_chinese_chars", True)),
                max_word=100,
            )
            return _with_added_tokens(backend, config, BERT_ROLES)
        case "tokenizer.model":
            return GPTSentencePieceTokenizer(str(directory / "tokenizer.model"))
    return None


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; an empty one if there is no file."""
    if not os.path.lexists(path):
        return {}
    try:
        values = parse_json(read_tokenizer_file(str(path), "tokenizer"))
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise DataError(f"{path} is not a JSON object")
    return values


def _read_config(directory: Path) -> dict[str, Any]:
    """Return the entries of tokenizer_config.json, and of older files unless it has `added_tokens_decoder`."""
    config = read_json_object(directory / "tokenizer_config.json")
    if "added_tokens_decoder" in config:
        return config
    config |= read_json_object(directory / "special_tokens_map.json")
    return {**config, "added_tokens": read_json_object(directory / "added_tokens.json")}


def _with_added_tokens(backend: Backend, config: Mapping[str, Any], defaults: Mapping[str, str]) -> HuggingFaceTokenizer:
    """Return a tokenizer with the added tokens of its directory.

    They are added in transformers' order, which decides the ids of new ones: listed tokens by id, then further special ones.

    Args:
        backend: the tokenizer without added tokens; it is modified.
        config: entries of tokenizer_config.json.
        defaults: special tokens, by role, that are assumed if the directory names none.
    """
    roles = dict(defaults)
    for role in ROLES:
        if f"{role}_token" in config:
            roles[role] = _token_text(config[f"{role}_token"])
    roles = {role: token for role, token in roles.items() if token}
    listed = {token.content: token for token in _listed_tokens(config, set(roles.values()))}
    # A listed token keeps the options of its entry for how it is found in texts, such as `lstrip`.
    further = (
        _token_text(entry) for entry in config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    )
    listed |= {token: AddedToken(token, special=True) for token in (*roles.values(), *further) if token not in listed}
    for token in listed.values():
        if token.special:
            backend.add_special_tokens([token])
        else:
            backend.add_tokens([token])
    return wrap_backend(backend, roles)


def _token_text(entry: object) -> str:
    """Return the text of a special token, given as a string or as an object with further options."""
    return str(entry.get("content") or "") if isinstance(entry, dict) else str(entry or "")


def _listed_tokens(config: Mapping[str, Any], special: set[str]) -> Iterator[AddedToken]:
    """Yield the tokens of `added_tokens_decoder` or added_tokens.json, by id; DataError if an entry is invalid."""
    try:
        entries = sorted((int(token_id), entry) for token_id, entry in config.get("added_tokens_decoder", {}).items())
        for _, entry in entries:
            yield AddedToken(**entry)
        for token, _ in sorted(config.get("added_tokens", {}).items(), key=lambda pair: int(pair[1])):
            yield AddedToken(token, normalized=token not in special, special=token in special)
    except (TypeError, ValueError, AttributeError) as error:
        raise DataError(f"the added tokens of tokenizer_config.json or added_tokens.json are invalid: {error}") from error


def wrap_backend(backend: Backend, roles: Mapping[str, str]) -> HuggingFaceTokenizer:
    """Return a tokenizer of the `tokenizers` package as a `HuggingFaceTokenizer`, by way of a temporary tokenizer.json.

    roles: its special tokens by role: `bos`, `eos`, `unk`, `sep`, `pad`, `cls`, `mask`.
    """
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "tokenizer.json").write_text(backend.to_str(pretty=False) + "\n", encoding="utf-8")
        named = {f"{role}_token": token for role, token in roles.items()}
        (folder / "special_tokens_map.json").write_text(json.dumps(named, indent=2) + "\n", encoding="utf-8")
        try:
            return HuggingFaceTokenizer(name)
        except DataError as error:  # its message names the temporary folder, which no longer exists
            raise DataError(f"it cannot be written as a tokenizer.json: {error.__cause__ or error}") from error
