"""Read the tokenizers of Hugging Face directories, and compare them with those that transformers opens there.

A directory's authors and users run transformers, so its tokenizer is the reference wherever it is installed: ids, special
tokens and added tokens are compared at import with the source directory, and at export with the written one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megatron.data.errors import DataError
from megatron.data.hugging_face import ROLES, has_hf_tokenizer, read_hf_tokenizer, wrap_backend
from megatron.data.matching import PROBE_TEXTS
from megatron.data.tokenizer_base import HugeIdError, Tokenizer

MAX_ADDED_TOKENS = 64  # so many with the lowest ids, and so many with the highest, are tested in texts


class TokenizerError(Exception):
    """transformers cannot open a tokenizer."""


def auto_tokenizer(directory: Path) -> Any | None:
    """Return a directory's tokenizer as transformers opens it; None if transformers is not installed.

    TokenizerError if transformers cannot open it.
    """
    if find_spec("transformers") is None:
        return None
    import transformers

    logging: Any = transformers.utils.logging
    logging.set_verbosity_error()
    try:
        return transformers.AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises many types; the user needs to see each
        raise TokenizerError(f"transformers cannot open its tokenizer: {type(error).__name__}: {error}") from error


def import_tokenizer(directory: Path, say: Callable[[str], None]) -> Tokenizer | None:
    """Read the tokenizer of a Hugging Face directory, with the same ids as transformers' `AutoTokenizer`.

    The files are read by our own code first. If `AutoTokenizer` gives other ids, its backend is used instead.

    Args:
        directory: the Hugging Face directory.
        say: receives a line if the tokenizer could not be compared.

    Returns:
        The tokenizer; None if the directory has none.

    Raises:
        DataError: the files are damaged, or no tokenizer here gives the same ids.
    """
    if not has_hf_tokenizer(directory):
        return None
    tokenizer: Tokenizer | None = None
    own_error: DataError | None = None
    try:
        tokenizer = read_hf_tokenizer(directory)
    except HugeIdError as error:
        raise DataError(f"{directory}: {error}; --no-tokenizer imports the weights alone") from error
    except DataError as error:  # transformers may still be able to read it
        own_error = error
    try:
        hf_tokenizer = auto_tokenizer(directory)
    except TokenizerError as error:
        raise DataError(f"{directory}: {error}; --no-tokenizer imports the weights alone") from error
    if hf_tokenizer is None:
        say("the tokenizer was not compared with transformers', which is not installed")
        if own_error is not None:
            raise own_error
        return tokenizer
    if tokenizer is not None and tokenizer_difference(tokenizer, hf_tokenizer) is None:
        return tokenizer
    backend = getattr(hf_tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise DataError(
            f"{directory}: a {type(hf_tokenizer).__name__} cannot be used here; --no-tokenizer imports the weights alone"
        )
    try:
        tokenizer = wrap_backend(backend, {role: token for role, token, _ in special_tokens_by_role(hf_tokenizer)})
    except DataError as error:
        raise DataError(f"{directory}: its tokenizer: {error}; --no-tokenizer imports the weights alone") from error
    if difference := tokenizer_difference(tokenizer, hf_tokenizer):
        raise DataError(f"{directory}: the tokenizer here is not transformers': {difference}; --no-tokenizer leaves it out")
    return tokenizer


def special_tokens_by_role(hf_tokenizer: Any) -> Iterator[tuple[str, str, int]]:
    """Yield role, token and id of each special token of a tokenizer of transformers."""
    for role in ROLES:
        token, number = getattr(hf_tokenizer, f"{role}_token", None), getattr(hf_tokenizer, f"{role}_token_id", None)
        if token is not None and number is not None:
            yield role, str(token), int(number)


def tokenizer_difference(tokenizer: Tokenizer, hf_tokenizer: Any) -> str | None:
    """Return as text the first difference between our tokenizer and one of transformers; None if they are equal.

    Compared are the whole vocabulary, the special tokens, and the ids of test texts, some of them with added tokens.
    """
    vocab: dict[str, int] = hf_tokenizer.get_vocab()
    size = max(vocab.values(), default=-1) + 1
    if size != tokenizer.vocab_size:
        return f"it has {tokenizer.vocab_size} tokens, transformers' {size}"
    for token, number in vocab.items():
        if tokenizer.piece(number) != token:
            return f"token {number} is {tokenizer.piece(number)!r}, for transformers {token!r}"
    special = {role: number for role, _, number in special_tokens_by_role(hf_tokenizer)}
    if differing := {role for role in ROLES if special.get(role) != tokenizer.special.get(role)}:
        role = min(differing)
        return f"the {role} token is {tokenizer.special.get(role)}, for transformers {special.get(role)}"
    for text in (*PROBE_TEXTS, *_texts_with_added_tokens(hf_tokenizer)):
        ids, hf_ids = tokenizer.tokenize(text), hf_tokenizer(text, add_special_tokens=False)["input_ids"]
        if ids != hf_ids:
            return f"{text[:60]!r} is {ids[:20]}, for transformers {hf_ids[:20]}"
    return None


def _texts_with_added_tokens(hf_tokenizer: Any) -> Iterator[str]:
    """Yield texts with each added token in the middle of a word, between spaces and repeated."""
    added = sorted(hf_tokenizer.get_added_vocab().items(), key=lambda pair: int(pair[1]))
    for token, _ in {**dict(added[:MAX_ADDED_TOKENS]), **dict(added[-MAX_ADDED_TOKENS:])}.items():
        yield f"Hello{token}world {token} and{token}{token}\n{token}  end"
