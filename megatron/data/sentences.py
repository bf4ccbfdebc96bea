"""Split text into sentences by rules, without a model to download, in time proportional to the text's length."""

from __future__ import annotations

import re
from collections.abc import Iterator

CLOSING, OPENING = "\"'\u201d\u2019)\\]", "\"'\u201c\u2018(\\["  # quotes and brackets
# A sentence ends at a blank line; after a full stop or other mark, closing quotes or brackets and white space, if a character
# follows that can begin a sentence; or, in Chinese and Japanese, after the mark alone. Each alternative is tried only at the
# first place of a run of white space or quotes, so that no run is scanned more than a few times.
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
MAX_WORD = 16  # characters before a full stop that are examined; more than in the longest abbreviation
LAST_WORD = re.compile(rf"([\w.]{{1,{MAX_WORD}}})\.$")


def split_sentences(text: str, keep_newlines: bool = False) -> Iterator[str]:
    """Yield the sentences of a text without the white space around them; a blank line always ends a sentence.

    keep_newlines: keep the white space after each sentence as part of it.
    """
    begin = 0
    for end in _sentence_ends(text):
        sentence = text[begin:end]
        begin = end
        if stripped := sentence.strip():
            yield sentence if keep_newlines else stripped


def _sentence_ends(text: str) -> Iterator[int]:
    """Yield the index after each sentence and the white space that follows it."""
    begin = 0
    for match in BOUNDARY.finditer(text):
        kind = match.lastgroup or ""
        if kind == "gap" and not ends_sentence(text, begin, match.start("mark")):
            continue
        # The named group ends after the white space, before quotes that open the next sentence.
        begin = match.end(kind)
        yield begin
    yield len(text)


def ends_sentence(text: str, begin: int, end: int) -> bool:
    """Return whether the mark before `end` ends the sentence that starts at `begin`.

    It does not after an abbreviation or a single initial. Only a few characters before it are examined, since otherwise a text
    with a full stop after each word, as in a list of authors, would take quadratic time.

    Args:
        text: the whole text.
        begin: index of the sentence's first character.
        end: index after the mark.
    """
    word = LAST_WORD.search(text, max(begin, end - 1 - MAX_WORD), end)
    if word is None:
        return True
    # Only the last letter of "J.R." is examined.
    last_part = word[1].rsplit(".", 1)[-1]
    is_initial = len(last_part) == 1 and last_part.isalpha() and last_part.isupper() and last_part != "I"
    return not (is_initial or word[1].lower() in ABBREVIATIONS)
