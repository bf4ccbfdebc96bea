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


def _alike(before: str, whole: str) -> int:
    """How many characters both begin with: all of `before`, but for a last one that the next token changes."""
    if whole.startswith(before):
        return len(before)
    return next(i for i in range(len(before) + 1) if i >= len(whole) or i >= len(before) or before[i] != whole[i])
