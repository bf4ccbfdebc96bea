"""Cut texts longer than the model's sequences into overlapping windows in which every token is scored once; pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Window:
    """A part of a text that the model sees at once.

    Attributes:
        tokens: all but the last one are input, all but the first one labels: at least two.
        num_scored: number of labels that are scored, at least one; they are the last ones, the others were scored before and
            are context.
    """

    tokens: Sequence[int]
    num_scored: int


def split_windows(tokens: Sequence[int], seq_length: int, overlap: int, *, full: bool = False) -> Iterator[Window]:
    """Yield the windows of a text; every token but the first is scored in exactly one of them.

    Args:
        tokens: of the text.
        seq_length: tokens that the model reads at once.
        overlap: Megatron-LM's --overlapping-eval, the distance from one window to the next, and so the number of tokens that
            are new in it; from 1, where every token has the longest context, to `seq_length`, where it is the cheapest.
        full: where the last window has fewer new tokens, move it back, so that it has as much context as the others; else
            it is shorter.
    """
    targets, done = len(tokens) - 1, 0
    while done < targets:
        new = overlap if done else seq_length  # nothing comes before the first window, so all of it is new
        end = min(done + new, targets)
        start = max(0, (end if full else done + new) - seq_length)
        yield Window(tokens[start : end + 1], end - done)
        done = end
