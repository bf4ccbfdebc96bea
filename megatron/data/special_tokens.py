"""Special tokens: choose those that end and begin documents, and report those that occur in texts."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType

from megatron.config.schema import TokenizerConfig
from megatron.data.errors import DataError
from megatron.data.fast_tokenizers import USUAL_ENDS
from megatron.data.tokenizer_base import Tokenizer

ROLE_FLAGS: Mapping[str, str] = MappingProxyType(
    {"eod": "--eod-token", "bos": "--bos-token"}
)  # flags that choose the token of a role
MAX_LISTED = 8  # tokens that a message lists


def choose_tokens(tokenizer: Tokenizer, config: TokenizerConfig) -> Tokenizer:
    """Give the roles eod and bos to the tokens of `--eod-token` and `--bos-token`; DataError if there is no such token."""
    for role, token in (("eod", config.eod_token), ("bos", config.bos_token)):
        if token is not None:
            tokenizer.choose(role, find_token(tokenizer, ROLE_FLAGS[role], token))
    return tokenizer


def find_token(tokenizer: Tokenizer, flag: str, token: str) -> int:
    """Return the id of a token that is given by its id, or by its text in the vocabulary.

    Args:
        tokenizer: the tokenizer.
        flag: the flag that gave the token, for the message.
        token: the id in decimal digits, or the text.

    Raises:
        DataError: if there is no such token.
    """
    size = tokenizer.vocab_size
    if token.isascii() and token.isdecimal():
        if int(token[:20]) < size:  # cut, since int() refuses thousands of digits
            return int(token)
        raise DataError(f"{flag} {token}: {tokenizer.kind} has the ids 0 to {size - 1}")
    token_id = None if not token else next((i for i in range(size) if tokenizer.piece(i) == token), None)
    if token_id is None:
        names = [
            describe_token(tokenizer, n)
            for n in dict.fromkeys([*tokenizer.special.values(), *tokenizer.special_in_text.values()])
        ]
        more = ", ..." if len(names) > MAX_LISTED else ""
        listed = f"special ones are {', '.join(names[:MAX_LISTED])}{more}" if names else "it has no special ones"
        raise DataError(f"{flag} {token!r}: {tokenizer.kind} has no such token; {listed}; any other can be named by its id")
    return token_id


def describe_token(tokenizer: Tokenizer, token_id: int) -> str:
    """Return a description of a token for messages: its text and its id."""
    return f"{tokenizer.piece(token_id)!r} (id {token_id})"


def describe_document_tokens(tokenizer: Tokenizer, config: TokenizerConfig, *, append_eod: bool) -> Iterator[str]:
    """Yield lines for the user about the tokens that documents will end and begin with.

    Args:
        tokenizer: the tokenizer that `build_tokenizer` made from the settings.
        config: the settings.
        append_eod: whether the end-of-document token is appended to each document.
    """
    eod = tokenizer.special.get("eod")
    if eod is not None:
        use = "appended to each document" if append_eod else "not appended, since --append-eod is not given"
        yield f"end of document: {describe_token(tokenizer, eod)}, {use}"
        if config.eod_token is None and tokenizer.piece(eod) not in USUAL_ENDS:
            usual = next((n for n in map(tokenizer.special_in_text.get, USUAL_ENDS) if n is not None), None)
            if usual is not None:
                advice = f"--eod-token '{tokenizer.piece(usual)}' chooses it"
                token = describe_token(tokenizer, usual)
                yield f"note: the tokenizer also has {token}, which base models use as end of document; {advice}"
    else:
        yield "end of document: the tokenizer has none; --eod-token chooses one"
    if config.bos_token is not None:
        yield f"first token: {describe_token(tokenizer, tokenizer.token('bos'))}, put before each document"


class SpecialTokenCounter:
    """Counts the special tokens that occur in texts. tokens: see `Tokenizer.special_in_text`."""

    def __init__(self, tokens: Iterable[str]) -> None:
        # Longest first, since a regular expression takes the first alternative that matches.
        longest_first = sorted(tokens, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None

    def __call__(self, texts: Iterable[str]) -> Counter[str]:
        """Return the number of occurrences of each token in these texts."""
        return (
            Counter[str]()
            if self._pattern is None
            else Counter(token for text in texts for token in self._pattern.findall(text))
        )


def describe_special_tokens(tokenizer: Tokenizer, counts: Mapping[str, int], *, plain: bool) -> str:
    """Return a line for the user about the special tokens in the texts.

    Args:
        tokenizer: the tokenizer that tokenized the texts.
        counts: number of occurrences of each token.
        plain: whether they were tokenized as plain text.
    """
    if not tokenizer.special_in_text:
        return f"special tokens in the text: {tokenizer.kind} recognizes none, so everything is plain text"
    if not counts:
        return "special tokens in the text: none"
    by_count = sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))
    listed = ", ".join(f"{token} {count}" for token, count in by_count[:MAX_LISTED]) + (
        ", ..." if len(counts) > MAX_LISTED else ""
    )
    treatment = "read as plain text" if plain else "kept as ids; --special-tokens-in-text plain reads them as plain text"
    return f"special tokens in the text: {sum(counts.values())} ({listed}), {treatment}"
