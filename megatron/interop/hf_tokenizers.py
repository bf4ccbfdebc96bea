"""Tokenizers of Hugging Face directories, compared with what transformers opens there.

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

MAX_MARKS = 64  # added tokens that are tried in text, from either end of the vocabulary


class TokenizerError(Exception):
    """transformers cannot open a tokenizer, or makes other ids of a text."""


def auto_tokenizer(directory: Path) -> Any | None:
    """Open a directory with the tokenizer of transformers; None where that is not installed. TokenizerError when it fails."""
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
    """The tokenizer of a Hugging Face directory, with the ids of transformers' `AutoTokenizer`; None where it holds none.

    Ours is read from the same files. Where transformers makes something else of them, its tokenizer is taken as it stands.
    DataError for damaged files, and where no tokenizer here gives the same ids. say: is told in a line what was compared.
    """
    if not has_hf_tokenizer(directory):
        return None
    ours: Tokenizer | None = None
    why_not: DataError | None = None
    try:
        ours = read_hf_tokenizer(directory)
    except HugeIdError as error:
        raise DataError(f"{directory}: {error}; --no-tokenizer imports the weights alone") from error
    except DataError as error:  # transformers may read it all the same
        why_not = error
    try:
        theirs = auto_tokenizer(directory)
    except TokenizerError as error:
        raise DataError(f"{directory}: {error}; --no-tokenizer imports the weights alone") from error
    if theirs is None:
        say("the tokenizer was not compared with transformers', which is not installed")
        if why_not is not None:
            raise why_not
        return ours
    if ours is not None and disagreement(ours, theirs) is None:
        return ours
    backend = getattr(theirs, "backend_tokenizer", None)
    if backend is None:
        raise DataError(f"{directory}: a {type(theirs).__name__} cannot be used here; --no-tokenizer imports the weights alone")
    try:
        ours = wrap_backend(backend, {role: token for role, token, _ in special_tokens(theirs)})
    except DataError as error:
        raise DataError(f"{directory}: its tokenizer: {error}; --no-tokenizer imports the weights alone") from error
    if why := disagreement(ours, theirs):
        raise DataError(f"{directory}: the tokenizer here is not transformers': {why}; --no-tokenizer leaves it out")
    return ours


def special_tokens(theirs: Any) -> Iterator[tuple[str, str, int]]:
    """The roles of special tokens that a tokenizer of transformers has, each with its token and its id."""
    for role in ROLES:
        token, number = getattr(theirs, f"{role}_token", None), getattr(theirs, f"{role}_token_id", None)
        if token is not None and number is not None:
            yield role, str(token), int(number)


def disagreement(ours: Tokenizer, theirs: Any) -> str | None:
    """In what our tokenizer differs from one of transformers, in words; None where they are the same.

    Compared are the whole vocabulary, the special tokens, and the ids of texts, added tokens among them.
    """
    vocab: dict[str, int] = theirs.get_vocab()
    size = max(vocab.values(), default=-1) + 1
    if size != ours.vocab_size:
        return f"it has {ours.vocab_size} tokens, transformers' {size}"
    for token, number in vocab.items():
        if ours.piece(number) != token:
            return f"token {number} is {ours.piece(number)!r}, for transformers {token!r}"
    special = {role: number for role, _, number in special_tokens(theirs)}
    if other := {role for role in ROLES if special.get(role) != ours.special.get(role)}:
        role = min(other)
        return f"the {role} token is {ours.special.get(role)}, for transformers {special.get(role)}"
    for text in (*PROBE_TEXTS, *_marks(theirs)):
        found, wanted = ours.tokenize(text), theirs(text, add_special_tokens=False)["input_ids"]
        if found != wanted:
            return f"{text[:60]!r} is {found[:20]}, for transformers {wanted[:20]}"
    return None


def _marks(theirs: Any) -> Iterator[str]:
    """Texts with added tokens in the middle of words, between spaces and side by side."""
    added = sorted(theirs.get_added_vocab().items(), key=lambda pair: int(pair[1]))
    for token, _ in {**dict(added[:MAX_MARKS]), **dict(added[-MAX_MARKS:])}.items():
        yield f"Hello{token}world {token} and{token}{token}\n{token}  end"
