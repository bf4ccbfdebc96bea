"""Special tokens: choose those at the end and beginning of documents, and report those that occur in texts."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType

from megatron.config.schema import TokenizerConfig
from megatron.data.errors import DataError
from megatron.data.fast_tokenizers import USUAL_ENDS
from megatron.data.tokenizer_base import Tokenizer

ROLE_FLAGS: Mapping[str, str] = MappingProxyType({"eod": "--eod-token", "bos": "--bos-token"})  # the flag of a role
MAX_NAMED = 8  # tokens that a message lists


def choose_tokens(tokenizer: Tokenizer, config: TokenizerConfig) -> Tokenizer:
    """Give the roles of `--eod-token` and `--bos-token` to the tokens that they name; DataError for one that is not there."""
    for role, wanted in (("eod", config.eod_token), ("bos", config.bos_token)):
        if wanted is not None:
            tokenizer.choose(role, find_token(tokenizer, ROLE_FLAGS[role], wanted))
    return tokenizer


def find_token(tokenizer: Tokenizer, flag: str, wanted: str) -> int:
    """Return the id of a token that is named by its id, or by its text as the vocabulary has it.

    Args:
        tokenizer: the one that must have it.
        flag: the flag that named it, for the message.
        wanted: the name; decimal digits are an id.

    Raises:
        DataError: when there is no such token.
    """
    size = tokenizer.vocab_size
    if wanted.isascii() and wanted.isdecimal():
        if int(wanted[:20]) < size:  # no int is made of thousands of digits
            return int(wanted)
        raise DataError(f"{flag} {wanted}: {tokenizer.kind} has the ids 0 to {size - 1}")
    number = None if not wanted else next((n for n in range(size) if tokenizer.piece(n) == wanted), None)
    if number is None:
        names = [
            describe_token(tokenizer, n)
            for n in dict.fromkeys([*tokenizer.special.values(), *tokenizer.special_in_text.values()])
        ]
        more = ", ..." if len(names) > MAX_NAMED else ""
        have = f"special ones are {', '.join(names[:MAX_NAMED])}{more}" if names else "it has no special ones"
        raise DataError(f"{flag} {wanted!r}: {tokenizer.kind} has no such token; {have}; any other can be named by its id")
    return number


def describe_token(tokenizer: Tokenizer, number: int) -> str:
    """Return a description of a token for messages: its text and its id."""
    return f"{tokenizer.piece(number)!r} (id {number})"


def describe_document_tokens(tokenizer: Tokenizer, config: TokenizerConfig, *, append_eod: bool) -> Iterator[str]:
    """Yield lines for the user about the tokens that documents will end and begin with.

    Args:
        tokenizer: made by `build_tokenizer` of the settings.
        config: the settings.
        append_eod: whether documents get an end.
    """
    eod = tokenizer.special.get("eod")
    if eod is not None:
        use = "appended to each document" if append_eod else "not appended, since --append-eod is not given"
        yield f"end of document: {describe_token(tokenizer, eod)}, {use}"
        if config.eod_token is None and tokenizer.piece(eod) not in USUAL_ENDS:
            usual = next((n for n in map(tokenizer.special_in_text.get, USUAL_ENDS) if n is not None), None)
            if usual is not None:
                way = f"--eod-token '{tokenizer.piece(usual)}' chooses it"
                yield f"note: the tokenizer also has {describe_token(tokenizer, usual)}, as base models end documents; {way}"
    else:
        yield "end of document: the tokenizer has none; --eod-token chooses one"
    if config.bos_token is not None:
        yield f"first token: {describe_token(tokenizer, tokenizer.token('bos'))}, put before each document"


class SpecialTokenCounter:
    """Counts the special tokens that occur in texts. tokens: see `Tokenizer.special_in_text`."""

    def __init__(self, tokens: Iterable[str]) -> None:
        # A regular expression takes the first alternative, which must not be the beginning of a longer token.
        longest_first = sorted(tokens, key=len, reverse=True)
        self._any = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None

    def __call__(self, texts: Iterable[str]) -> Counter[str]:
        """Return how often each token occurs in these texts."""
        return Counter[str]() if self._any is None else Counter(token for text in texts for token in self._any.findall(text))


def describe_special_tokens(tokenizer: Tokenizer, met: Mapping[str, int], *, plain: bool) -> str:
    """Return a line for the user about the special tokens in the texts.

    Args:
        tokenizer: the one that read the texts.
        met: number of times that each token was met.
        plain: whether they were read as plain text.
    """
    if not tokenizer.special_in_text:
        return f"special tokens in the text: {tokenizer.kind} has none there, everything is plain text"
    if not met:
        return "special tokens in the text: none"
    first = sorted(met.items(), key=lambda entry: (-entry[1], entry[0]))
    listed = ", ".join(f"{token} {count}" for token, count in first[:MAX_NAMED]) + (", ..." if len(met) > MAX_NAMED else "")
    how = "read as plain text" if plain else "kept as ids; --special-tokens-in-text plain reads them as plain text"
    return f"special tokens in the text: {sum(met.values())} ({listed}), {how}"
