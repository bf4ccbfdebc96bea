"""Cut long texts into parts whose tokens, concatenated, are the tokens of the whole text.

Tokenizers need at least a hundred bytes of memory for each character that they are given at once. A `Seam` is made for one
tokenizer and decides whether a text can be cut at a given place. If a tokenizer has no seam, or a text no such place, the text
stays whole.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator

MAX_PART = 1 << 16  # characters of a part, if the text can be cut often enough
MAX_TRIES = 8  # candidate places of one kind that are tried in half a part
# Without the apostrophe: many tokenizers make the end of "don't" a word.
PUNCTUATION = ',.;:!?)]}>"\u3001\u3002\uff0c\uff01\uff1f\uff1b\uff1a\uff09\u300d\u300f\u2026'
SPACE = "\u2581"  # "▁", which stands for a space in many vocabularies
SEPARATORS = frozenset(f" \n{SPACE}{PUNCTUATION}")
# Candidate places for cuts, all after a letter or digit. First: before a single space and the next word, which suits most
# tokenizers. Then: before white space or punctuation.
CUT_PATTERNS = (
    re.compile(r"(?<=[^\W_])(?= [^\W_])"),
    re.compile(rf"(?<=[^\W_])(?=[ \n{re.escape(PUNCTUATION)}])"),
)


class Seam(ABC):
    """Decides where texts can be cut for one tokenizer. context: number of characters on either side that `judge` needs."""

    context: int = 64

    @abstractmethod
    def judge(self, left: str, right: str) -> int | None:
        """Decide whether a text can be cut at a match of `CUT_PATTERNS`, from the text around it.

        Args:
            left: `context` characters before the place, fewer at the text's beginning.
            right: `context` characters after it, fewer at the text's end.

        Returns:
            Number of characters after the place to leave out of both parts: 0, or 1 for a space that the tokenizer itself
            puts before each text. None if the text must not be cut.
        """


class WhiteSpaceSeam(Seam):
    """Cuts texts before white space, for a tokenizer that reads words one by one."""

    def judge(self, left: str, right: str) -> int | None:
        """Allow a cut before white space."""
        return 0 if right[0].isspace() else None


def split_text(text: str, make_seam: Callable[[], Seam | None]) -> Iterator[str]:
    """Yield the parts of a text, in order; a text of at most `MAX_PART` characters is one part, for which no seam is made."""
    begin = 0
    if len(text) > MAX_PART and (seam := make_seam()) is not None:
        for place, skipped in _find_cuts(text, seam):
            yield text[begin:place]
            begin = place + skipped
    yield text[begin:]


def _find_cuts(text: str, seam: Seam) -> Iterator[tuple[int, int]]:
    """Yield places for cuts, at least half a part apart, each with the number of characters after it to leave out."""
    step = MAX_PART // 2
    start = step
    while start < len(text):
        found = _find_cut(text, start, start + step, seam)
        if found is not None:
            yield found
        start = step + (start if found is None else found[0])  # if nothing was found, search the next half part


def _find_cut(text: str, start: int, stop: int, seam: Seam) -> tuple[int, int] | None:
    """Return a place in `[start, stop)` where the seam allows a cut, and the number of characters after it to leave out."""
    for pattern in CUT_PATTERNS:
        for tries, match in enumerate(pattern.finditer(text, start, stop)):
            if tries == MAX_TRIES:
                break  # the seam will probably reject all places of this kind
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
        """Return whether the text contains one of the tokens."""
        return any(text[i : i + n] in self._tokens for n in self._lengths for i in range(len(text) - n + 1))
