"""Convert WikiText's tokenised files to ordinary text.

The files have spaces around punctuation, and @-@ within words, but models are trained on ordinary text. The rules for removing
these are those of GPT-2 and Megatron-LM, with which published figures were computed, including their errors: a lone N becomes a
1, and "dogs ' tails" becomes "dogs' tails".
"""

from __future__ import annotations

# The order matters, since later rules apply to the results of earlier ones.
CONTRACTIONS = (("s '", "s'"),)
NUMBERS = ((" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", "."))
PUNCTUATION = tuple((f" {mark} ", f"{mark} ") for mark in ":;.!?,")
HEADINGS = (("= = = =", "===="), ("= = =", "==="), ("= =", "=="))
OTHER = (
    (" \N{DEGREE SIGN} ", "\N{DEGREE SIGN}"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
)
PAIRS = (("(", ")"), ("[", "]"), ("{", "}"), ('"', '"'), ("'", "'"))


def detokenize(text: str) -> str:
    """Return a text without the spaces and marks that WikiText's tokeniser inserted."""
    for old, new in (*CONTRACTIONS, *NUMBERS, *PUNCTUATION):
        text = text.replace(old, new)
    for left, right in PAIRS:
        text = _strip_inside(text, left, right)
    for old, new in (*HEADINGS, *OTHER):
        text = text.replace(old, new)
    return text


def _strip_inside(text: str, left: str, right: str) -> str:
    """Remove white space just after each opening mark and just before the next closing one."""
    parts: list[str] = []
    begin = 0
    while (start := text.find(left, begin)) >= 0 and (end := text.find(right, start + 1)) >= 0:
        parts += [text[begin:start], left, text[start + 1 : end].strip(), right]
        begin = end + 1  # pairs do not nest, so the next search starts after the closing mark
    return "".join([*parts, text[begin:]])


def word_count(text: str) -> int:
    """Return the number of words as Megatron-LM counts them: separated by single spaces, so a line end can be a word."""
    return len(text.strip().split(" "))
