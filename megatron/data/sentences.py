"""Split text into sentences by rules, with no model to download, in time proportional to any text."""

from __future__ import annotations

import re
from collections.abc import Iterator

CLOSING, OPENING = "\"'\u201d\u2019)\\]", "\"'\u201c\u2018(\\["  # quotes and brackets
# The end of a sentence: a blank line; or a mark, closing quotes or brackets, white space, and what can begin the next one; or,
# in Chinese and Japanese, the mark alone. Each alternative is tried at one place of a run of white space or of quotes only,
# its first, so that no run is read more than a few times.
BOUNDARY = re.compile(
    r"(?P<paragraph>(?<!\s)\s*\n\s*\n\s*)"
    rf"|(?<=[.!?\u2026])(?P<mark>)[{CLOSING}]*(?P<gap>\s+)(?=[{OPENING}]*[A-Z0-9\u00c0-\u00d6\u00d8-\u00de\u0410-\u042f])"
    r"|(?<=[\u3002\uff01\uff1f])(?P<wide>\s*)(?=\S)"
)
ABBREVIATIONS = frozenset(
    [
        "mr",
        "mrs",
        "ms",
        "dr",
        "prof",
        "sr",
        "jr",
        "st",
        "mt",
        "rev",
        "hon",
        "gen",
        "col",
        "capt",
        "lt",
        "sgt",
        "maj",
        "gov",
        "sen",
        "rep",
        "pres",
        "vs",
        "etc",
        "al",
        "e.g",
        "i.e",
        "eg",
        "ie",
        "cf",
        "fig",
        "figs",
        "eq",
        "eqs",
        "sec",
        "no",
        "nos",
        "vol",
        "vols",
        "pp",
        "p",
        "ed",
        "eds",
        "approx",
        "est",
        "inc",
        "ltd",
        "co",
        "corp",
        "dept",
        "univ",
        "jan",
        "feb",
        "mar",
        "apr",
        "jun",
        "jul",
        "aug",
        "sep",
        "sept",
        "oct",
        "nov",
        "dec",
        "u.s",
        "u.k",
    ]
)
MAX_WORD = 16  # characters before a full stop that are looked at: more than the longest abbreviation
LAST_WORD = re.compile(rf"([\w.]{{1,{MAX_WORD}}})\.$")


def split_sentences(text: str, keep_newlines: bool = False) -> Iterator[str]:
    """Yield the sentences of a text, stripped of white space around them; a blank line always ends one.

    keep_newlines: leave the white space after a sentence on its end, so that the parts join to the text again.
    """
    begin = 0
    for end in _ends(text):
        part = text[begin:end]
        begin = end
        if stripped := part.strip():
            yield part if keep_newlines else stripped


def _ends(text: str) -> Iterator[int]:
    """Yield the place after each sentence and the white space that follows it."""
    begin = 0
    for match in BOUNDARY.finditer(text):
        kind = match.lastgroup or ""
        if kind == "gap" and not ends_sentence(text, begin, match.start("mark")):
            continue
        # The named group ends behind the white space, but before quotes that open the next sentence.
        begin = match.end(kind)
        yield begin
    yield len(text)


def ends_sentence(text: str, begin: int, end: int) -> bool:
    """Return whether the mark before `end` ends the sentence that starts at `begin`.

    It does not after an abbreviation or a single initial. Only a few characters are looked at: a full stop for each word, as in
    a list of authors, must not read the list from its start each time.

    Args:
        text: the whole text.
        begin: place of the sentence's first character.
        end: place after the mark.
    """
    word = LAST_WORD.search(text, max(begin, end - 1 - MAX_WORD), end)
    if word is None:
        return True
    # Of "J.R." only the last letter counts.
    last = word[1].rsplit(".", 1)[-1]
    initial = len(last) == 1 and last.isalpha() and last.isupper() and last != "I"
    return not (initial or word[1].lower() in ABBREVIATIONS)
