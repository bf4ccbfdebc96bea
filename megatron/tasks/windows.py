"""Texts longer than the model's sequences, cut into overlapping windows in which every token is scored once; pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Window:
    """What the model sees at once.

    tokens: all but the last one are its input, all but the first one its labels: at least two. counted: how many of the
    labels are scored, at least one; they are the last ones, the others have been before and are context.
    """

    tokens: Sequence[int]
    counted: int


def windows(tokens: Sequence[int], seq_length: int, overlap: int, *, full: bool = False) -> Iterator[Window]:
    """The windows of a text; every token but the first is counted in exactly one of them.

    seq_length: tokens that the model reads at once. overlap: Megatron-LM's --overlapping-eval: how far each window lies
    behind the one before, and so how many tokens are new in it; from 1, where every token has the longest context, to
    seq_length, where it is the cheapest. Where the last window has fewer new tokens it is shorter; full moves it back
    instead, so that it has as much context as the others.
    """
    targets, done = len(tokens) - 1, 0
    while done < targets:
        new = overlap if done else seq_length
        end = min(done + new, targets)
        start = max(0, (end if full else done + new) - seq_length)
        yield Window(tokens[start : end + 1], end - done)
        done = end
