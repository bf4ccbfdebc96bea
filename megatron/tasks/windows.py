"""Split texts longer than the model's sequences into overlapping windows, in which every token is scored once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Window:
    """A part of a text that the model reads at once.

    Attributes:
        tokens: at least two token ids; all but the last are the input, all but the first are the labels.
        num_scored: number of labels to score, at least one: the last ones. Earlier windows score the labels before them.
    """

    tokens: Sequence[int]
    num_scored: int


def split_windows(tokens: Sequence[int], seq_length: int, overlap: int, *, full: bool = False) -> Iterator[Window]:
    """Yield the windows of a text; every token but the first is scored in exactly one of them.

    Args:
        tokens: token ids of the text.
        seq_length: tokens that the model reads at once.
        overlap: Megatron-LM's --overlapping-eval: the distance between the starts of two windows, and so the number of new
            tokens in each. With 1 every token gets the longest context; `seq_length` is the fastest.
        full: fill a last window that has fewer new tokens up with context; otherwise it is shorter.
    """
    num_labels, scored = len(tokens) - 1, 0
    while scored < num_labels:
        num_new = overlap if scored else seq_length  # all tokens of the first window are new
        end = min(scored + num_new, num_labels)
        start = max(0, (end if full else scored + num_new) - seq_length)
        yield Window(tokens[start : end + 1], end - scored)
        scored = end
