"""Reads the tables of this folder into one: flag -> what it does here.

--flag          takes no value
--flag=?        takes one, whatever it is; --flag=*: takes any number
--flag=a|b      these values change nothing (without effect) or ask for nothing (refused); any other is an error
--family-*      every flag that begins with --family-
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from megatron.config.command_line.other_flags.refused import FEATURES, OTHERWISE
from megatron.config.command_line.other_flags.renamed import RENAMED
from megatron.config.command_line.other_flags.without_effect import WITHOUT_EFFECT

VALUE = "VALUE"  # in the words that a renamed flag is read as


@dataclass(frozen=True)
class OtherFlag:
    """A known flag that is no field.

    flag: its name, or the beginning of a family's with `*` after it. takes: the number of values, 0, 1 or *.
    text: why it changes nothing, or what the error says after it. refused: whether it is an error.
    legal: the values that change nothing, where that depends on them. means: the words that it is read as, VALUE for its own.
    """

    flag: str
    takes: str
    text: str = ""
    refused: bool = False
    legal: tuple[str, ...] = ()
    means: tuple[str, ...] = ()

    def accepts(self, values: Sequence[str]) -> bool:
        """Whether these values change nothing."""
        if self.legal:
            return bool(values) and set(values) <= set(self.legal)
        return not self.refused


def key(flag: str) -> str:
    """A flag's spelling with dashes only."""
    return flag.replace("_", "-")


def _read(token: str, text: str, refused: bool) -> OtherFlag:
    flag, _, values = token.partition("=")
    if values in ("?", "*"):
        return OtherFlag(flag, "1" if values == "?" else "*", text, refused)
    legal = tuple(values.split("|")) if values else ()
    takes = "*" if refused or legal or flag.endswith("*") else "0"
    return OtherFlag(flag, takes, text, refused, legal)


def _renamed(line: str) -> OtherFlag:
    flag, *means = line.split()
    return OtherFlag(flag, "1" if VALUE in means else "0", means=tuple(means))


@cache
def other_flags() -> Mapping[str, OtherFlag]:
    """Every flag and family of the tables, by its spelling with dashes only."""
    rows = [_read(token, text, False) for text, flags in WITHOUT_EFFECT.items() for token in flags.split()]
    rows += [_read(token, f"belongs to {text}", True) for text, flags in FEATURES.items() for token in flags.split()]
    rows += [_read(token, text, True) for text, flags in OTHERWISE.items() for token in flags.split()]
    rows += [_renamed(line) for line in RENAMED.strip().splitlines()]
    return {key(row.flag): row for row in rows}


def find_other(word: str) -> OtherFlag | None:
    """What a flag is that is no field, by its own name or its family's; None for one that Megatron-LM does not have."""
    table = other_flags()
    if word.endswith("*"):
        return None
    parts = word.split("-")
    families = ("-".join(parts[:end]) + "-*" for end in range(len(parts) - 1, 2, -1))
    return table.get(word) or next((table[family] for family in families if family in table), None)
