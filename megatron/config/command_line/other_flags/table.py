"""Read the tables of Megatron-LM's other flags into one.

Their notation:

--flag          takes no value
--flag=?        takes one value of any kind; --flag=* takes any number of them
--flag=a|b      these values have no effect; any other is an error
--family-*      every flag that begins with --family-
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from megatron.config.command_line.other_flags.refused import FEATURES, OTHERWISE
from megatron.config.command_line.other_flags.renamed import RENAMED
from megatron.config.command_line.other_flags.without_effect import WITHOUT_EFFECT
from megatron.config.command_line.spelling import normalize_flag

VALUE = "VALUE"  # the old flag's value, in the words that replace it


@dataclass(frozen=True)
class OtherFlag:
    """A known flag that sets no field.

    Attributes:
        flag: the flag, or the common beginning of a family and `*`.
        takes: number of values, "0", "1" or "*".
        text: the reason why it has no effect, or the message that follows the flag in an error.
        refused: the flag is an error.
        legal: the values that have no effect, if others are an error.
        means: the words that replace the flag, with VALUE for its value; empty if none do.
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


def _read(token: str, text: str, refused: bool) -> OtherFlag:
    """Read a flag in the notation of the tables, under its reason or message."""
    flag, _, values = token.partition("=")
    if values in ("?", "*"):
        return OtherFlag(flag, "1" if values == "?" else "*", text, refused)
    legal = tuple(values.split("|")) if values else ()
    # Of a flag that is refused all values are passed over, so that they are no mistakes of their own.
    takes = "*" if refused or legal or flag.endswith("*") else "0"
    return OtherFlag(flag, takes, text, refused, legal)


def _renamed(line: str) -> OtherFlag:
    """Read a row of `RENAMED`."""
    flag, *means = line.split()
    return OtherFlag(flag, "1" if VALUE in means else "0", means=tuple(means))


@cache
def other_flags() -> Mapping[str, OtherFlag]:
    """Return every flag and family of the tables, by the normalized flag."""
    rows = [_read(token, text, False) for text, flags in WITHOUT_EFFECT.items() for token in flags.split()]
    rows += [_read(token, f"belongs to {text}", True) for text, flags in FEATURES.items() for token in flags.split()]
    rows += [_read(token, text, True) for text, flags in OTHERWISE.items() for token in flags.split()]
    rows += [_renamed(line) for line in RENAMED.strip().splitlines()]
    return {normalize_flag(row.flag): row for row in rows}


def find_other(word: str) -> OtherFlag | None:
    """Find a normalized flag that sets no field, by its own name or its family's; None for one that Megatron-LM lacks."""
    table = other_flags()
    if word.endswith("*"):  # a family's row is no flag
        return None
    parts = word.split("-")
    # From the longest beginning down to `--a-*`, so that the narrowest family is found.
    families = ("-".join(parts[:end]) + "-*" for end in range(len(parts) - 1, 2, -1))
    return table.get(word) or next((table[family] for family in families if family in table), None)
