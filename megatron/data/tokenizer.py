"""Build tokenizers, which turn text into token ids and back, for each `--tokenizer-type`.

tokenizer = build_tokenizer(TokenizerConfig(tokenizer_type="ByteTokenizer"))
tokenizer.tokenize("text")           # list of ids below tokenizer.vocab_size
tokenizer.save(directory)            # load_tokenizer(directory) needs no other file
tokenizer.hf_files(directory, 1024)  # AutoTokenizer.from_pretrained(directory) opens them
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from megatron.config.schema import TokenizerConfig
from megatron.data.cuts import MAX_PART, Seam, WhiteSpaceSeam
from megatron.data.errors import DataError
from megatron.data.fast_tokenizers import BertWordPieceCase, BertWordPieceLowerCase, GPT2BPETokenizer, HuggingFaceTokenizer
from megatron.data.sentence_piece import GPTSentencePieceTokenizer, SentencePieceTokenizer
from megatron.data.special_tokens import ROLE_FLAGS, choose_tokens
from megatron.data.tokenizer_base import END_OF_TEXT, SAVED, Tokenizer, read_tokenizer_file
from megatron.files.regular import parse_json

__all__ = ["ByteTokenizer", "NullTokenizer", "Tokenizer", "build_tokenizer", "load_tokenizer"]


MAX_EXTRA_IDS = 100_000  # maximum extra_ids of a saved tokenizer


class ByteTokenizer(Tokenizer):
    """A tokenizer of bytes, without files: ids 0 to 255 are the bytes of the UTF-8 text, 256 ends documents."""

    kind = "ByteTokenizer"

    def __init__(self) -> None:
        self.special, self.assets = {"eod": 256}, {}

    @property
    def vocab_size(self) -> int:
        """257: the bytes and the end-of-document token."""
        return 257

    def tokenize(self, text: str) -> list[int]:
        """Return the bytes of a text in UTF-8."""
        return list(text.encode("utf-8"))

    def parts(self, text: str) -> Iterator[str]:
        """Yield parts of a text, which can be cut between any two characters."""
        return (text[start : start + MAX_PART] for start in range(0, max(1, len(text)), MAX_PART))

    def detokenize(self, ids: Sequence[int]) -> str:
        """Decode bytes as UTF-8; invalid ones become U+FFFD."""
        data = b"".join(END_OF_TEXT.encode() if i == 256 else bytes([i]) for i in ids if i < self.vocab_size)
        return data.decode("utf-8", errors="replace")

    def piece(self, token_id: int) -> str:
        """Return the symbol of a byte, as byte-level BPE writes it."""
        return dict(enumerate([*byte_symbols(), END_OF_TEXT])).get(token_id, "")

    def backend(self) -> Backend:
        """Return a byte-level BPE without merges."""
        backend = Backend(models.BPE(vocab={symbol: byte for byte, symbol in enumerate(byte_symbols())}, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens([AddedToken(END_OF_TEXT, normalized=False, special=True)])
        return backend


class NullTokenizer(Tokenizer):
    """A tokenizer of texts that consist of token ids, separated by white space; one more id ends documents."""

    kind = "NullTokenizer"

    def __init__(self, vocab_size: int) -> None:
        self._text_ids = vocab_size  # number of ids without the end-of-document token
        self.special, self.assets = {"eod": vocab_size}, {}

    @property
    def vocab_size(self) -> int:
        """The number of ids, including the end-of-document token."""
        return self._text_ids + 1

    def tokenize(self, text: str) -> list[int]:
        """Return the numbers in a text; DataError if a word is not an id."""
        words = text.split()
        for position, word in enumerate(words, 1):
            # int() would also accept 1_000 and digits of other scripts.
            if not (word.isascii() and word.isdecimal()):
                raise DataError(f"NullTokenizer reads whole numbers separated by spaces; word {position} is {word[:40]!r}")
            # Check the length first, since int() refuses thousands of digits.
            if len(word) > 10 or int(word) >= self.vocab_size:
                problem = f"word {position} is {word[:40]}, outside of --vocab-size {self._text_ids}"
                raise DataError(
                    f"NullTokenizer: {problem}: its ids are 0 to {self._text_ids - 1}, and {self._text_ids} ends a document"
                )
        return [int(word) for word in words]

    def read_special_as_text(self) -> None:
        """Raise a DataError, since the texts consist of ids."""
        raise DataError("--special-tokens-in-text plain: NullTokenizer's texts consist of ids, which cannot be read as text")

    @cached_property
    def seam(self) -> Seam | None:
        """The seam that cuts texts before white space."""
        return WhiteSpaceSeam()

    def detokenize(self, ids: Sequence[int]) -> str:
        """Return the ids as numbers, separated by spaces."""
        return " ".join(map(str, ids))

    def piece(self, token_id: int) -> str:
        """Return the id as a number."""
        return str(token_id)

    def backend(self) -> Backend:
        """Return a word-level tokenizer whose words are the numbers."""
        backend = Backend(models.WordLevel({str(i): i for i in range(self.vocab_size)}, unk_token=str(self._text_ids)))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        return backend

    def hf_files(self, directory: str | os.PathLike[str], max_length: int, *, segments: bool = False) -> None:
        """Raise a DataError, since there is no Hugging Face form of this tokenizer.

        Args:
            directory: not written.
            max_length: not used.
            segments: not used.
        """
        raise DataError("NullTokenizer has no text, so there is nothing that Hugging Face could open")


def byte_symbols() -> list[str]:
    """Return the 256 characters that stand for bytes in GPT-2's byte-level BPE; printable ones stand for themselves."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = (chr(256 + i) for i in range(256))
    return [chr(byte) if byte in printable else next(others) for byte in range(256)]


def build_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """Build the tokenizer that these settings name.

    Raises DataError if a file is missing, unreadable or of another kind, or if the tokenizer lacks the token of --eod-token or
    --bos-token.
    """
    return choose_tokens(_read_files(config), config)


def _read_files(config: TokenizerConfig) -> Tokenizer:
    """Build the tokenizer from its files, without --eod-token and --bos-token."""
    kind = config.tokenizer_type
    if kind is None:
        raise DataError("no tokenizer: give --tokenizer-type (ByteTokenizer needs no file)")

    def require(flag: str, value: Any) -> Any:
        if value is None:
            raise DataError(f"--tokenizer-type {kind} needs {flag}")
        return value

    match kind:
        case "ByteTokenizer":
            return ByteTokenizer()
        case "NullTokenizer":
            return NullTokenizer(require("--vocab-size", config.vocab_size))
        case "GPT2BPETokenizer":
            return GPT2BPETokenizer(require("--vocab-file", config.vocab_file), require("--merge-file", config.merge_file))
        case "BertWordPieceLowerCase":
            return BertWordPieceLowerCase(require("--vocab-file", config.vocab_file), config.vocab_extra_ids)
        case "BertWordPieceCase":
            return BertWordPieceCase(require("--vocab-file", config.vocab_file), config.vocab_extra_ids)
        case "HuggingFaceTokenizer":
            return HuggingFaceTokenizer(require("--tokenizer-model", config.tokenizer_model))
        case "SentencePieceTokenizer" | "GPTSentencePieceTokenizer":
            model = require("--tokenizer-model", config.tokenizer_model)
            if kind == "GPTSentencePieceTokenizer":
                return GPTSentencePieceTokenizer(model)
            return SentencePieceTokenizer(model, config.vocab_extra_ids)
    raise DataError(f"unknown --tokenizer-type {kind}")


def saved_settings(directory: str | os.PathLike[str]) -> TokenizerConfig:
    """Return the settings of the tokenizer that `save` put into a directory; DataError if they are missing or damaged."""
    return _read_saved(Path(directory))[0]


def _read_saved(folder: Path) -> tuple[TokenizerConfig, object]:
    """Return the settings of a saved tokenizer, and its digest."""
    try:
        saved = parse_json(read_tokenizer_file(str(folder / SAVED), "tokenizer"))
        kind, size, extra, digest = saved["type"], saved["vocab_size"], saved["extra_ids"], saved["digest"]
        chosen = saved.get("chosen", {})
        if not (isinstance(kind, str) and type(size) is int and type(extra) is int and 0 <= extra <= min(size, MAX_EXTRA_IDS)):
            raise ValueError("its type, vocab_size or extra_ids is invalid")
        if not all(role in ROLE_FLAGS and type(token_id) is int for role, token_id in chosen.items()):
            raise ValueError("its chosen tokens are invalid")
    except KeyError as error:
        raise DataError(f"{folder / SAVED} is damaged: {error} is missing") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{folder / SAVED} is damaged: {error}") from error

    def path_if(name: str, *kinds: str) -> str | None:
        return str(folder / name) if kind.startswith(kinds) else None

    eod, bos = (str(chosen[role]) if role in chosen else None for role in ("eod", "bos"))
    config = TokenizerConfig(
        tokenizer_type=kind,
        vocab_file=path_if("vocab.json", "GPT2") or path_if("vocab.txt", "Bert"),
        merge_file=path_if("merges.txt", "GPT2"),
        tokenizer_model=path_if("tokenizer.json", "HuggingFace")
        or path_if("tokenizer.model", "SentencePiece", "GPTSentencePiece"),
        vocab_size=size - 1 if kind == "NullTokenizer" else None,
        vocab_extra_ids=extra,
        eod_token=eod,
        bos_token=bos,
    )
    return config, digest


def load_tokenizer(directory: str | os.PathLike[str]) -> Tokenizer:
    """Load the tokenizer that `save` put into a directory; DataError if it is missing, incomplete or changed."""
    folder = Path(directory)
    config, digest = _read_saved(folder)
    tokenizer = build_tokenizer(config)
    if tokenizer.digest() != digest:
        raise DataError(f"the tokenizer in {folder} was changed after it was saved ({digest} then, {tokenizer.digest()} now)")
    return tokenizer
