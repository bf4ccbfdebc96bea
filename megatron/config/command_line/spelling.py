"""Spellings of the settings on a command line: each flag, its aliases, and the flags that look like one."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from megatron.config.command_line.other_flags.other_frameworks import CALLED, find_other_framework
from megatron.config.option import Option
from megatron.config.options import options

MIN_LIKENESS = 0.8  # difflib's ratio from which a spelling counts as near
MAX_WRONG_LETTERS = 3
TAKES_VALUE: Any = object()


@dataclass(frozen=True)
class Spelling:
    """One flag as typed. `value` is what it sets, or TAKES_VALUE when the value follows; whether it `yields` to others."""

    flag: str
    option: Option
    value: Any = TAKES_VALUE
    yields: bool = False


def plain(flag: str) -> str:
    """A spelling with dashes only: `--num_layers` and `--num-layers` are the same flag."""
    return "-" * (len(flag) - len(flag.lstrip("-"))) + flag.lstrip("-").replace("_", "-")


@cache
def spellings() -> Mapping[str, Spelling]:
    """Plain flag -> what it sets."""
    table: dict[str, Spelling] = {}
    for o in options():
        value = TAKES_VALUE if o.kind is not bool else o.off is None
        for flag in (o.flag, *o.aliases):
            table[plain(flag)] = Spelling(flag, o, value)
        for flag, constant in o.constants.items():
            table[plain(flag)] = Spelling(flag, o, constant, flag in o.yielding)
    return table


def is_flag(word: str) -> bool:
    """Return whether a word of the command line is a flag; `-1e-5` is a value."""
    return re.match(r"--?[A-Za-z]", word) is not None


def known_flags() -> list[str]:
    """Every flag that means something, as it is spelled."""
    return [s.flag for s in spellings().values()]


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """Return `; did you mean X or Y?`, and for a word that is near to none an empty string."""
    alike = difflib.get_close_matches(word, known, n=3, cutoff=MIN_LIKENESS)
    near = [other for other in alike if _wrong_letters(word, other) <= MAX_WRONG_LETTERS]
    return f"; did you mean {' or '.join(near)}?" if near else ""


def _wrong_letters(word: str, other: str) -> int:
    edits = difflib.SequenceMatcher(None, word, other).get_opcodes()
    return sum(max(i2 - i1, j2 - j1) for tag, i1, i2, j1, j2 in edits if tag != "equal")


def name_here(word: str) -> str | None:
    """Return what a flag of another framework is here, `train.global_batch_size` included; None if nothing is known of it."""
    last = "--" + word.rpartition(".")[2]
    if "." in word and last in spellings():
        return find_other_framework(word) or f"{CALLED} {spellings()[last].flag} here"
    return find_other_framework(word)
