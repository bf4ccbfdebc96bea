"""WikiText's text as people write it; pure.

The benchmark's files are tokenised: spaces around punctuation, @-@ within words. Models are trained on ordinary text, so the
spaces are taken out first, by the rules with which the published figures were made (those of GPT-2 and Megatron-LM), oddities
included: a lone N becomes a 1, and "dogs ' tails" closes up to "dogs' tails". The perplexity is then normalised
to the number of words of the tokenised file, which makes models with different vocabularies comparable.
"""

from __future__ import annotations

import re

# In this order: a later rule sees what an earlier one made.
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
# Spaces just inside of a pair: between an opening mark and the next closing one.
PAIRS = tuple(
    (re.compile(rf"{re.escape(left)}\s*([^{re.escape(right)}]*?)\s*{re.escape(right)}"), rf"{left}\1{right}")
    for left, right in ("()", "[]", "{}", '""', "''")
)


def detokenize(text: str) -> str:
    """The text without the spaces that WikiText's tokeniser put in."""
    for old, new in (*CONTRACTIONS, *NUMBERS, *PUNCTUATION):
        text = text.replace(old, new)
    for pair, closed in PAIRS:
        text = pair.sub(closed, text)
    for old, new in (*HEADINGS, *REST):
        text = text.replace(old, new)
    return text


def word_count(text: str) -> int:
    """Tokens of the benchmark's file, as Megatron-LM counts them: what single spaces separate, line ends among them."""
    return len(text.strip().split(" "))
