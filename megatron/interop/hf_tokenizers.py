"""Read the tokenizers of Hugging Face directories, and compare them with what transformers opens there.

transformers is what a directory's authors and users run, so where it is installed it decides: ids, special tokens and added
tokens of ours are compared with its own, at import on the source and at export on what was written.
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

MAX_ADDED_TOKENS = 64  # added tokens that are tried in text, from either end of the vocabulary


class TokenizerError(Exception):
    """transformers cannot open a tokenizer, or makes other ids of a text."""


def auto_tokenizer(directory: Path) -> Any | None:
    """Open a directory's tokenizer by transformers; None where that is not installed. TokenizerError when it fails."""
    if find_spec("transformers") is None:
        return None
    import transformers

    logging: Any = transformers.utils.logging
    logging.set_verbosity_error()
    try:
        return transformers.AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever transformers trips over is what the user must hear
        raise TokenizerError(f"transformers cannot open its tokenizer: {type(error).__name__}: {error}") from error


def import_tokenizer(directory: Path, say: Callable[[str], None]) -> Tokenizer | None:
    """Read the tokenizer of a Hugging Face directory, with the ids of transformers' `AutoTokenizer`.

    Ours is read from the same files. Where transformers makes something else of them, its tokenizer is taken as it stands.

    Args:
        directory: the Hugging Face directory.
        say: is told in a line where nothing was compared.

    Returns:
        The tokenizer; None where the directory holds none.

    Raises:
        DataError: for damaged files, and where no tokenizer here gives the same ids.
    """
    if not has_hf_tokenizer(directory):
        return None
    tokenizer: Tokenizer | None = None
    own_error: DataError | None = None
    try:
        tokenizer = read_hf_tokenizer(directory)
    except HugeIdError as error:
        raise DataError(f"{directory}: {error}; --no-tokenizer imports the weights alone") from error
    except DataError as error:  # transformers may read it all the same
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
    if why := tokenizer_difference(tokenizer, hf_tokenizer):
        raise DataError(f"{directory}: the tokenizer here is not transformers': {why}; --no-tokenizer leaves it out")
    return tokenizer


def special_tokens_by_role(hf_tokenizer: Any) -> Iterator[tuple[str, str, int]]:
    """Yield the roles of special tokens that a tokenizer of transformers has, each with its token and its id."""
    for role in ROLES:
        token, number = getattr(hf_tokenizer, f"{role}_token", None), getattr(hf_tokenizer, f"{role}_token_id", None)
        if token is not None and number is not None:
            yield role, str(token), int(number)


def tokenizer_difference(tokenizer: Tokenizer, hf_tokenizer: Any) -> str | None:
    """Return in words the first difference of our tokenizer and one of transformers; None where they are the same.

    The whole vocabulary is compared, the special tokens, and the ids of texts, added tokens among them.
    """
    vocab: dict[str, int] = hf_tokenizer.get_vocab()
    size = max(vocab.values(), default=-1) + 1
    if size != tokenizer.vocab_size:
        return f"it has {tokenizer.vocab_size} tokens, transformers' {size}"
    for token, number in vocab.items():
        if tokenizer.piece(number) != token:
            return f"token {number} is {tokenizer.piece(number)!r}, for transformers {token!r}"
    special = {role: number for role, _, number in special_tokens_by_role(hf_tokenizer)}
    if other := {role for role in ROLES if special.get(role) != tokenizer.special.get(role)}:
        role = min(other)
        return f"the {role} token is {tokenizer.special.get(role)}, for transformers {special.get(role)}"
    for text in (*PROBE_TEXTS, *_texts_with_added_tokens(hf_tokenizer)):
        found, wanted = tokenizer.tokenize(text), hf_tokenizer(text, add_special_tokens=False)["input_ids"]
        if found != wanted:
            return f"{text[:60]!r} is {found[:20]}, for transformers {wanted[:20]}"
    return None


def _texts_with_added_tokens(hf_tokenizer: Any) -> Iterator[str]:
    """Yield texts with added tokens in the middle of words, between spaces and side by side."""
    added = sorted(hf_tokenizer.get_added_vocab().items(), key=lambda pair: int(pair[1]))
    for token, _ in {**dict(added[:MAX_ADDED_TOKENS]), **dict(added[-MAX_ADDED_TOKENS:])}.items():
        yield f"Hello{token}world {token} and{token}{token}\n{token}  end"
