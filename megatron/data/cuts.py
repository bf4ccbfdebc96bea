"""Cut long texts into parts, so that the tokens of the parts, one after the other, are the tokens of the whole text.

Tokenizers keep a hundred bytes and more for each character of what they are given at once. A `Seam`, made from what is known of
a tokenizer, decides of a place whether the text can be cut there. Where there is no seam, or a text has no such place, the text
stays whole.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator

MAX_PART = 1 << 16  # characters of a part, where the text has a place for a cut that often
MAX_TRIES = 8  # places of a kind that a seam is asked about in half a part
# No apostrophe: many tokenizers take the end of "don't" for a word.
PUNCTUATION = ',.;:!?)]}>"\u3001\u3002\uff0c\uff01\uff1f\uff1b\uff1a\uff09\u300d\u300f\u2026'
SPACE = "\u2581"  # how many vocabularies write a space
SEPARATORS = frozenset(f" \n{SPACE}{PUNCTUATION}")
# After a letter or digit: before a single space and the next word, which suits most tokenizers, or before white space and
# punctuation.
PLACES = (
    re.compile(r"(?<=[^\W_])(?= [^\W_])"),
    re.compile(rf"(?<=[^\W_])(?=[ \n{re.escape(PUNCTUATION)}])"),
)


class Seam(ABC):
    """Decides where a tokenizer's texts can be cut. context: number of characters on either side that `judge` needs."""

    context: int = 64

    @abstractmethod
    def judge(self, left: str, right: str) -> int | None:
        """Decide about a place of `PLACES` from the text around it.

        Args:
            left: `context` characters before the place, fewer at the text's begin.
            right: `context` characters after it, fewer at the text's end.

        Returns:
            Number of characters after the place that belong to neither part: 0, or 1 where the tokenizer itself puts a space
            before a text. None where the text must not be cut.
        """


class WhiteSpaceSeam(Seam):
    """Cuts texts before white space, for a tokenizer that reads words one by one."""

    def judge(self, left: str, right: str) -> int | None:
        """Allow for a cut before white space."""
        return 0 if right[0].isspace() else None


def split_text(text: str, make_seam: Callable[[], Seam | None]) -> Iterator[str]:
    """Yield the parts of a text, in order; a text of at most `MAX_PART` characters is one, and asks for no seam."""
    begin = 0
    if len(text) > MAX_PART and (seam := make_seam()) is not None:
        for place, skipped in _places(text, seam):
            yield text[begin:place]
            begin = place + skipped
    yield text[begin:]


def _places(text: str, seam: Seam) -> Iterator[tuple[int, int]]:
    """Yield places for cuts, half a part or more apart, each with the characters after it that go with neither part."""
    step = MAX_PART // 2
    start = step
    while start < len(text):
        found = _place(text, start, start + step, seam)
        if found is not None:
            yield found
        start = step + (start if found is None else found[0])  # without a place the next half part is searched


def _place(text: str, start: int, stop: int, seam: Seam) -> tuple[int, int] | None:
    """Return the first place from `start` on that the seam allows for, and the characters after it to leave out."""
    for kind in PLACES:  # the kind that suits most tokenizers first
        for tries, match in enumerate(kind.finditer(text, start, stop)):
            if tries == MAX_TRIES:
                break  # a seam that says no so often does so for all of them
            place = match.start()
            skipped = seam.judge(text[max(0, place - seam.context) : place], text[place : place + seam.context])
            if skipped is not None:
                return place, skipped
    return None


def adjacent_pairs(pieces: Iterable[str]) -> frozenset[str]:
    """Return all pairs of adjacent characters in these pieces."""
    return frozenset(piece[i : i + 2] for piece in pieces for i in range(len(piece) - 1))


class TokenFinder:
    """Finds tokens in a short text, however many tokens there are."""

    def __init__(self, tokens: Iterable[str]) -> None:
        self._tokens = frozenset(tokens) - {""}
        self._lengths = sorted({len(token) for token in self._tokens})
        self.longest = max(self._lengths, default=0)

    def __call__(self, text: str) -> bool:
        """Return whether one of the tokens is part of the text."""
        return any(text[i : i + n] in self._tokens for n in self._lengths for i in range(len(text) - n + 1))
