"""Convert tokens to text incrementally."""

from __future__ import annotations

from collections.abc import Sequence

from megatron.data.tokenizer import Tokenizer

CONTEXT = 16  # number of earlier tokens that can affect how a token is decoded: by a space, or the start of a character
REPLACEMENT_CHARACTER = "\ufffd"  # a decoder's output for an incomplete character


def added_text(tokenizer: Tokenizer, tokens: Sequence[int], start: int, end: int | None = None) -> str:
    """Return the text that `tokens[start:end]` add to the text of the tokens before them.

    Args:
        tokenizer: the model's tokenizer.
        tokens: the tokens of a text.
        start: index of the first token of the part.
        end: index after its last token; None for the end of the text.
    """
    # Decoded with the tokens before, since some tokenizers decode the first token of a text without its space.
    before = tokenizer.detokenize(tokens[max(0, start - CONTEXT) : start])
    whole = tokenizer.detokenize(tokens[max(0, start - CONTEXT) : end])
    return whole[_alike(before, whole) :]


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """Return the text of a single token; for SentencePiece, with the character that stands for a space."""
    return tokenizer.piece(token) if "SentencePiece" in tokenizer.kind else tokenizer.detokenize([token])


def token_width(tokenizer: Tokenizer, tokens: Sequence[int], place: int) -> int:
    """Return how many characters a token adds to the text. A character of several tokens counts for the last of them.

    Args:
        tokenizer: the model's tokenizer.
        tokens: the tokens of the text.
        place: index of the token.
    """
    start = max(0, place - CONTEXT)
    before = tokenizer.detokenize(tokens[start:place]).rstrip(REPLACEMENT_CHARACTER)
    whole = tokenizer.detokenize(tokens[start : place + 1]).rstrip(REPLACEMENT_CHARACTER)
    return len(whole) - _alike(before, whole)


def _alike(before: str, whole: str) -> int:
    """Return the length of the common prefix: all of `before`, except for an incomplete last character."""
    if whole.startswith(before):
        return len(before)
    # The last character of `before` was incomplete, so the common prefix ends where the two texts differ.
    return next(i for i in range(len(before) + 1) if i >= len(whole) or i >= len(before) or before[i] != whole[i])
