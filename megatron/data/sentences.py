"""Text to sentences by rules, with no model to download."""

from __future__ import annotations

import re

CLOSING, OPENING = "\"'\u201d\u2019)\\]", "\"'\u201c\u2018(\\["  # quotes and brackets
# The end of a sentence: its mark, closing quotes or brackets, white space, and what can begin the next one; or, in
# Chinese and Japanese, the mark alone.
BOUNDARY = re.compile(
    rf"(?<=[.!?\u2026])[{CLOSING}]*(?P<gap>\s+)(?=[{OPENING}]*[A-Z0-9\u00c0-\u00d6\u00d8-\u00de\u0410-\u042f])"
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
LAST_WORD = re.compile(r"([\w.]+)\.$")


def split_sentences(text: str, keep_newlines: bool = False) -> list[str]:
    """The sentences of a text, stripped of white space around them; a blank line always ends one.

    keep_newlines: leave the white space after a sentence on its end, so that the parts join to the text again.
    """
    cuts = [0]
    for match in re.finditer(rf"(?P<paragraph>\s*\n\s*\n\s*)|{BOUNDARY.pattern}", text):
        group = next(g for g in ("paragraph", "gap", "wide") if match[g] is not None)
        if group == "gap" and not ends_sentence(text[cuts[-1] : match.start(group)]):
            continue
        cuts.append(match.end(group))
    parts = [text[a:b] for a, b in zip(cuts, [*cuts[1:], len(text)], strict=True)]
    return [part if keep_newlines else part.strip() for part in parts if part.strip()]


def ends_sentence(text: str) -> bool:
    """Whether the mark at the end of a text ends a sentence: not after an abbreviation or a single initial."""
    word = LAST_WORD.search(text.rstrip("\"'\u201d\u2019)]"))
    if word is None:
        return True
    last = word[1].rsplit(".", 1)[-1]
    initial = len(last) == 1 and last.isalpha() and last.isupper() and last != "I"
    return not (initial or word[1].lower() in ABBREVIATIONS)
