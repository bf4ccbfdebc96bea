"""Convert WikiText's tokenised files to ordinary text; pure.

The benchmark's files have spaces around punctuation, and @-@ within words. Models are trained on ordinary text, so the spaces
are removed first, by the rules of GPT-2 and Megatron-LM with which the published figures were made. These rules have their
quirks: a lone N becomes a 1, and "dogs ' tails" becomes "dogs' tails". The perplexity is then normalised by the number of words
of the tokenised file, which makes models with different vocabularies comparable.
"""

from __future__ import annotations

# The order matters, since later rules apply to the results of earlier ones.
CONTRACTIONS = (("s '", "s'"),)
NUMBERS = ((" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", "."))
PUNCTUATION = tuple((f" {mark} ", f"{mark} ") for mark in ":;.!?,")
HEADINGS = (("= = = =", "===="), ("= = =", "==="), ("= =", "=="))
REST = (
    (" \N{DEGREE SIGN} ", "\N{DEGREE SIGN}"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
)
PAIRS = (("(", ")"), ("[", "]"), ("{", "}"), ('"', '"'), ("'", "'"))


def detokenize(text: str) -> str:
    """Return a text without the spaces that WikiText's tokeniser put in."""
    for old, new in (*CONTRACTIONS, *NUMBERS, *PUNCTUATION):
        text = text.replace(old, new)
    for left, right in PAIRS:
        text = _strip_inside(text, left, right)
    for old, new in (*HEADINGS, *REST):
        text = text.replace(old, new)
    return text


def _strip_inside(text: str, left: str, right: str) -> str:
    """Remove the white space just inside pairs of an opening mark and the next closing one."""
    parts: list[str] = []
    begin = 0
    while (start := text.find(left, begin)) >= 0 and (end := text.find(right, start + 1)) >= 0:
        parts += [text[begin:start], left, text[start + 1 : end].strip(), right]
        begin = end + 1  # pairs do not nest: the next search starts behind the closing mark
    return "".join([*parts, text[begin:]])


def word_count(text: str) -> int:
    """Return the number of words of the benchmark's file, as Megatron-LM counts them: between single spaces, with line ends."""
    return len(text.strip().split(" "))
