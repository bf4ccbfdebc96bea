"""Tokens as text, piece by piece."""

from __future__ import annotations

from collections.abc import Sequence

from megatron.data.tokenizer import Tokenizer

CONTEXT = 16  # tokens before a place that settle how what follows is spelt: a space, the rest of a character
UNFINISHED = "\ufffd"  # what a decoder puts where the bytes of a character are not all there


def added_text(tokenizer: Tokenizer, tokens: Sequence[int], start: int, end: int | None = None) -> str:
    """The text that `tokens[start:end]` add to what is before them, where some tokenizers spell a first token otherwise."""
    before = tokenizer.detokenize(tokens[max(0, start - CONTEXT) : start])
    whole = tokenizer.detokenize(tokens[max(0, start - CONTEXT) : end])
    return whole[_alike(before, whole) :]


def single(tokenizer: Tokenizer, token: int) -> str:
    """One token by itself. A piece of SentencePiece keeps the sign that stands for its space."""
    return tokenizer.piece(token) if "SentencePiece" in tokenizer.kind else tokenizer.detokenize([token])


def width(tokenizer: Tokenizer, tokens: Sequence[int], place: int) -> int:
    """How many characters a token adds to the text before it. One of several tokens is added by the last of them."""
    start = max(0, place - CONTEXT)
    before = tokenizer.detokenize(tokens[start:place]).rstrip(UNFINISHED)
    whole = tokenizer.detokenize(tokens[start : place + 1]).rstrip(UNFINISHED)
    return len(whole) - _alike(before, whole)


def settled(text: str, stops: Sequence[str]) -> str:
    """The part of a text that is still being written which cannot change any more, and cannot begin a text that ends it."""
    text = text.rstrip(UNFINISHED)
    longest = max((_begun(text, stop) for stop in stops), default=0)
    return text[: len(text) - longest]


def _begun(text: str, stop: str) -> int:
    """How many characters of `stop`, short of all, the text ends with. In linear time, by Knuth, Morris and Pratt."""
    falls = [0] * len(stop)  # for each prefix of `stop`: its longest end that is a shorter prefix
    for place in range(1, len(stop)):
        falls[place] = _step(stop, falls, falls[place - 1], stop[place])
    matched = 0
    for character in text[max(0, len(text) - len(stop) + 1) :]:
        matched = _step(stop, falls, matched, character)
    return matched


def _step(stop: str, falls: Sequence[int], matched: int, character: str) -> int:
    """How much of `stop` is matched after one more character."""
    while matched and stop[matched] != character:
        matched = falls[matched - 1]
    return matched + (stop[matched] == character)


def before_stop(text: str, stops: Sequence[str]) -> str:
    """The text as far as the first of `stops` in it."""
    return text[: min([at for stop in stops if (at := text.find(stop)) >= 0], default=len(text))]


def _alike(before: str, whole: str) -> int:
    """How many characters both begin with: all of `before`, but for a last one that the next token changes."""
    if whole.startswith(before):
        return len(before)
    return next(i for i in range(len(before) + 1) if i >= len(whole) or i >= len(before) or before[i] != whole[i])
