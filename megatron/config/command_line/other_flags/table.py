"""Combine the tables of Megatron-LM's flags that set no field into one.

The tables write flags in this notation:

--flag          without a value; in a table of refused flags, with any values
--flag=?        with one value, which is ignored
--flag=*        with any number of values, which are ignored
--flag=a|b      with one of these values the flag has no effect; with any other it is an error
--family-*      all flags that begin with --family-
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from megatron.config.command_line.other_flags.refused import FEATURES, OTHER_MESSAGES
from megatron.config.command_line.other_flags.renamed import RENAMED
from megatron.config.command_line.other_flags.without_effect import WITHOUT_EFFECT
from megatron.config.command_line.spelling import normalize_flag

VALUE = "VALUE"  # placeholder for the old flag's value in the words that replace the flag


@dataclass(frozen=True)
class OtherFlag:
    """A flag of Megatron-LM that sets no field here: it is ignored, refused or replaced.

    Attributes:
        flag: the flag; for a family, its common prefix and `*`.
        takes: number of values, "0", "1" or "*".
        text: the reason why the flag has no effect, or the end of the error that begins with the flag.
        refused: the flag is an error.
        legal: the values with which the flag has no effect, if all others are errors.
        means: the words that replace the flag, with VALUE in the place of its value; empty if it is ignored or refused.
    """

    flag: str
    takes: str
    text: str = ""
    refused: bool = False
    legal: tuple[str, ...] = ()
    means: tuple[str, ...] = ()

    def accepts(self, values: Sequence[str]) -> bool:
        """Return whether the flag has no effect with these values."""
        if self.legal:
            return bool(values) and set(values) <= set(self.legal)
        return not self.refused


def _parse_flag(token: str, text: str, refused: bool) -> OtherFlag:
    """Parse a flag in the notation of the tables; `text` is its reason or message."""
    flag, _, values = token.partition("=")
    if values in ("?", "*"):
        return OtherFlag(flag, "1" if values == "?" else "*", text, refused)
    legal = tuple(values.split("|")) if values else ()
    # All values of a refused flag are consumed, so that they are not reported as further mistakes.
    takes = "*" if refused or legal or flag.endswith("*") else "0"
    return OtherFlag(flag, takes, text, refused, legal)


def _parse_renamed(line: str) -> OtherFlag:
    """Parse a row of `RENAMED`."""
    flag, *means = line.split()
    return OtherFlag(flag, "1" if VALUE in means else "0", means=tuple(means))


@cache
def other_flags() -> Mapping[str, OtherFlag]:
    """Return every flag and family of the tables, by normalized flag."""
    rows = [_parse_flag(token, text, False) for text, flags in WITHOUT_EFFECT.items() for token in flags.split()]
    rows += [_parse_flag(token, f"belongs to {text}", True) for text, flags in FEATURES.items() for token in flags.split()]
    rows += [_parse_flag(token, text, True) for text, flags in OTHER_MESSAGES.items() for token in flags.split()]
    rows += [_parse_renamed(line) for line in RENAMED.strip().splitlines()]
    return {normalize_flag(row.flag): row for row in rows}


def find_other(word: str) -> OtherFlag | None:
    """Return the row of a normalized flag, or of the family that it belongs to; None if no table contains it."""
    table = other_flags()
    if word.endswith("*"):  # the key of a family, which is not a flag
        return None
    parts = word.split("-")
    # Longest prefix first, down to `--a-*`, so that the most specific family is found.
    families = ("-".join(parts[:end]) + "-*" for end in range(len(parts) - 1, 2, -1))
    return table.get(word) or next((table[family] for family in families if family in table), None)
