"""Turn tokens into text, piece by piece."""

from __future__ import annotations

from collections.abc import Sequence

from megatron.data.tokenizer import Tokenizer

CONTEXT = 16  # tokens before a place that settle how what follows is spelt: a space, the rest of a character
REPLACEMENT_CHARACTER = "\ufffd"  # what a decoder puts where the bytes of a character are not all there


def added_text(tokenizer: Tokenizer, tokens: Sequence[int], start: int, end: int | None = None) -> str:
    """Return the text that `tokens[start:end]` add to what is before them, where some tokenizers spell a first token otherwise.

    Args:
        tokenizer: of the model.
        tokens: a text, and what is before it.
        start: number of the first token of the part.
        end: number behind its last one; None for all that follow.
    """
    # Some tokens before the part settle whether its first one is spelt with a space.
    before = tokenizer.detokenize(tokens[max(0, start - CONTEXT) : start])
    whole = tokenizer.detokenize(tokens[max(0, start - CONTEXT) : end])
    return whole[_alike(before, whole) :]


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """Return one token by itself. A piece of SentencePiece keeps the sign that stands for its space."""
    return tokenizer.piece(token) if "SentencePiece" in tokenizer.kind else tokenizer.detokenize([token])


def token_width(tokenizer: Tokenizer, tokens: Sequence[int], place: int) -> int:
    """Return how many characters a token adds to the text before it. One of several tokens is added by the last of them.

    Args:
        tokenizer: of the model.
        tokens: the text.
        place: number of the token in it.
    """
    start = max(0, place - CONTEXT)
    before = tokenizer.detokenize(tokens[start:place]).rstrip(REPLACEMENT_CHARACTER)
    whole = tokenizer.detokenize(tokens[start : place + 1]).rstrip(REPLACEMENT_CHARACTER)
    return len(whole) - _alike(before, whole)


def _alike(before: str, whole: str) -> int:
    """Return how many characters both begin with: all of `before`, but for a last one that the next token changes."""
    if whole.startswith(before):
        return len(before)
    # The last character of `before` was unfinished: it stops where the two differ.
    return next(i for i in range(len(before) + 1) if i >= len(whole) or i >= len(before) or before[i] != whole[i])
