"""The base class of tokenizers, with saving and export to Hugging Face."""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

from tokenizers import Tokenizer as Backend

from megatron.data.cuts import Seam, split_text
from megatron.data.errors import DataError
from megatron.files.foreign import HEAD_BYTES, recognize_bytes, recognize_hub_name
from megatron.files.regular import MAX_VOCABULARY_BYTES, read_bytes

END_OF_TEXT = "<|endoftext|>"
SAVED = "megatron_tokenizer.json"  # the file with a saved tokenizer's settings


class HugeIdError(DataError):
    """A token's id exceeds MAX_TOKENS. Such a tokenizer cannot be saved either, since saving iterates over all smaller ids."""


class Tokenizer(ABC):
    """The interface of a tokenizer for training, preprocessing, export and generation.

    Attributes:
        kind: its `--tokenizer-type`.
        special: ids of its special tokens by role: eod, bos, eos, unk, cls, sep, pad, mask.
        assets: contents of the files it was made from, by the name under which they are saved.
        extra_ids: value of --vocab-extra-ids.
        chosen: roles that flags gave to tokens, with their ids.
    """

    kind: ClassVar[str]
    special: Mapping[str, int]
    assets: Mapping[str, bytes]
    extra_ids: int = 0
    chosen: Mapping[str, int] = MappingProxyType({})

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """One more than the largest id."""

    @abstractmethod
    def tokenize(self, text: str) -> list[int]:
        """Return the ids of a text, with nothing added before or after it."""

    @abstractmethod
    def detokenize(self, ids: Sequence[int]) -> str:
        """Return the text of these ids; special tokens appear by name.

        Ids beyond the vocabulary are skipped, since a model's vocabulary may be larger.
        """

    @abstractmethod
    def piece(self, token_id: int) -> str:
        """Return the vocabulary entry with this id; "" if there is none."""

    @abstractmethod
    def backend(self) -> Backend:
        """Return an equal tokenizer of the `tokenizers` package, which can write a tokenizer.json."""

    def tokenize_many(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text."""
        return [self.tokenize(text) for text in texts]

    @property
    def special_in_text(self) -> Mapping[str, int]:
        """Ids of the special tokens that `tokenize` recognizes in texts, by their text."""
        return {}

    def read_special_as_text(self) -> None:
        """Tokenize special tokens in texts like any other text from now on; DataError if this is not possible."""
        return

    def choose(self, role: str, token_id: int) -> None:
        """Give a role of `special` to another token."""
        self.special, self.chosen = {**self.special, role: token_id}, {**self.chosen, role: token_id}

    @cached_property
    def seam(self) -> Seam | None:
        """The seam that finds places where a text can be cut without changing its tokens; None if none are known."""
        return None

    def parts(self, text: str) -> Iterator[str]:
        """Yield parts of a text whose tokens, concatenated, are those of the text. A short text is one part."""
        return split_text(text, lambda: self.seam)

    def token(self, role: str) -> int:
        """Return the id with this role; DataError if the tokenizer has none."""
        if role not in self.special:
            roles = ", ".join(sorted(self.special)) or "none"
            advice = "--eod-token names one, or " if role == "eod" else ""
            raise DataError(
                f"{self.kind} has no {role} token (it has: {roles}); {advice}use another --tokenizer-type or vocabulary"
            )
        return self.special[role]

    @property
    def eod(self) -> int:
        """The id that ends a document; DataError if there is none."""
        return self.token("eod")

    def identity(self) -> dict[str, Any]:
        """Return everything that determines the ids, as a JSON object: type, sizes, special tokens, digests of files."""
        files = {name: hashlib.sha256(data).hexdigest() for name, data in sorted(self.assets.items())}
        settings = dict(type=self.kind, vocab_size=self.vocab_size, extra_ids=self.extra_ids)
        return {**settings, "special": dict(self.special), "files": files}

    def digest(self) -> str:
        """Return the digest of `identity`, 16 hexadecimal digits."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()[:16]

    def vocabulary_digest(self) -> str:
        """Return a digest of `identity` without the roles of special tokens."""
        identity = {**self.identity(), "special": {}}
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write the tokenizer's files and its settings to a directory, for `load_tokenizer`."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in self.files().items():
            (folder / name).write_bytes(data)

    def files(self) -> dict[str, bytes]:
        """Return the files that `save` writes, by name."""
        settings = {**self.identity(), "chosen": dict(self.chosen), "digest": self.digest()}
        return {**self.assets, SAVED: (json.dumps(settings, indent=1) + "\n").encode()}

    def hf_files(self, directory: str | os.PathLike[str], max_length: int, *, segments: bool = False) -> None:
        """Write the files with which `AutoTokenizer.from_pretrained(directory)` returns a tokenizer with the same ids.

        Args:
            directory: the directory to write to; created if missing.
            max_length: maximum sequence length of the model, in tokens.
            segments: whether the model takes `token_type_ids`, which mark the second text of a pair; other models
                misinterpret or reject them.

        Raises:
            DataError: if the tokenizer in Hugging Face's form gives other ids for some texts.
        """
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        backend = self.backend()
        for text in PROBES:
            if backend.encode(text, add_special_tokens=False).ids != self.tokenize(text):
                raise DataError(f"this {self.kind} has no exact Hugging Face form: it splits {text!r} differently")
        roles = {role: role for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask") if role in self.special}
        if "eod" in self.chosen or "eos" not in self.special:
            roles["eos"] = "eod"  # the token with which the model learns to end a text
        tokens = {f"{role}_token": self.piece(self.special[own]) for role, own in roles.items() if own in self.special}
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": max_length,
            "clean_up_tokenization_spaces": False,
            **({"model_input_names": ["input_ids", "token_type_ids", "attention_mask"]} if segments else {}),
        }
        (folder / "tokenizer.json").write_text(backend.to_str(pretty=False) + "\n", encoding="utf-8")
        for name, content in {
            "tokenizer_config": {**settings, **tokens, **self.hf_extras()},
            "special_tokens_map": tokens,
        }.items():
            (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def hf_extras(self) -> dict[str, Any]:
        """Return additional entries of tokenizer_config.json."""
        return {}


# Texts that an exported tokenizer must tokenize like ours: case, digits, runs of white space, code, other scripts.
PROBES = (
    "Hello world",
    "The quick brown fox, 1234567890 times; isn't it?",
    "  two  spaces\tand a tab\nnew line\n\n",
    "def f(x):\n    return x ** 2  # café, naïve, 東京, Привет, 🙂",
)


def read_tokenizer_file(path: str, flag: str) -> bytes:
    """Return the content of a tokenizer file; DataError that names the flag if it cannot be read or is of another kind."""
    try:
        data = read_bytes(path, MAX_VOCABULARY_BYTES)
    except OSError as error:
        advice = "give DIR" if flag == "--tokenizer-model" else f"give {flag} its file in DIR"
        hub_name = (
            recognize_hub_name(path.removesuffix("/tokenizer.json"), advice) if isinstance(error, FileNotFoundError) else None
        )
        raise DataError(f"{flag} {path}: {f'it is {hub_name}' if hub_name else error.strerror or error}") from error
    if (found := recognize_bytes(data[:HEAD_BYTES], path, text=False)) is not None:
        raise DataError(f"{flag} {path}: it is {found}")
    return data
