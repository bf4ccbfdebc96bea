"""Convert tokens to text incrementally."""

from __future__ import annotations

from collections.abc import Sequence

from megatron.data.tokenizer import Tokenizer

CONTEXT_TOKENS = 16  # earlier tokens that can affect the text of a token: its leading space, or a character that began earlier
REPLACEMENT_CHARACTER = "\ufffd"  # what tokenizers return for an incomplete character


def added_text(tokenizer: Tokenizer, tokens: Sequence[int], start: int, end: int | None = None) -> str:
    """Return the text of `tokens[start:end]` as a continuation of the tokens before them.

    Args:
        tokenizer: the model's tokenizer.
        tokens: the tokens of a text.
        start: index of the first token to decode.
        end: index after the last token to decode; None for the end of the text.
    """
    # Decode with the tokens before: some tokenizers drop the leading space of a text's first token.
    before = tokenizer.detokenize(tokens[max(0, start - CONTEXT_TOKENS) : start])
    whole = tokenizer.detokenize(tokens[max(0, start - CONTEXT_TOKENS) : end])
    return whole[_common_prefix_length(before, whole) :]


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """Return the text of a single token; for SentencePiece, with the character that stands for a space."""
    return tokenizer.piece(token) if "SentencePiece" in tokenizer.kind else tokenizer.detokenize([token])


def token_width(tokenizer: Tokenizer, tokens: Sequence[int], index: int) -> int:
    """Return how many characters a token adds to the text. A character of several tokens counts for its last token.

    Args:
        tokenizer: the model's tokenizer.
        tokens: the tokens of the text.
        index: index of the token.
    """
    start = max(0, index - CONTEXT_TOKENS)
    before = tokenizer.detokenize(tokens[start:index]).rstrip(REPLACEMENT_CHARACTER)
    whole = tokenizer.detokenize(tokens[start : index + 1]).rstrip(REPLACEMENT_CHARACTER)
    return len(whole) - _common_prefix_length(before, whole)


def _common_prefix_length(before: str, whole: str) -> int:
    """Return the length of the common prefix of a text and its continuation; they can differ in an incomplete character."""
    if whole.startswith(before):
        return len(before)
    # The last character of `before` was incomplete, so search for the first difference.
    return next(i for i in range(len(before) + 1) if i >= len(whole) or i >= len(before) or before[i] != whole[i])
