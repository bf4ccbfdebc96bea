"""Split texts longer than the model's sequences into overlapping windows, so that every token is scored once; pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Window:
    """A part of a text that the model sees at once.

    Attributes:
        tokens: at least two token ids; all but the last are the input, all but the first are the labels.
        num_scored: number of labels that are scored, at least one. They are the last ones; the others are context, and were
            scored in earlier windows.
    """

    tokens: Sequence[int]
    num_scored: int


def split_windows(tokens: Sequence[int], seq_length: int, overlap: int, *, full: bool = False) -> Iterator[Window]:
    """Yield the windows of a text; every token but the first is scored in exactly one of them.

    Args:
        tokens: token ids of the text.
        seq_length: tokens that the model reads at once.
        overlap: Megatron-LM's --overlapping-eval: the distance between the starts of two windows, and so the number of new
            tokens in each. With 1 every token has the longest context; `seq_length` is the fastest.
        full: if the last window has fewer new tokens, fill it up with context; otherwise it is shorter.
    """
    targets, done = len(tokens) - 1, 0
    while done < targets:
        new = overlap if done else seq_length  # nothing comes before the first window, so all of it is new
        end = min(done + new, targets)
        start = max(0, (end if full else done + new) - seq_length)
        yield Window(tokens[start : end + 1], end - done)
        done = end
