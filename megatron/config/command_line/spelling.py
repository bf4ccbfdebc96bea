"""Spellings of the settings on a command line: flags, aliases and shortcuts, and suggestions for misspelled ones."""

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

MIN_LIKENESS = 0.8  # difflib's ratio from which a spelling is suggested
MAX_WRONG_LETTERS = 3  # beside the ratio, which for long flags allows words that have nothing to do with each other
TAKES_VALUE: Any = object()  # no value that a flag could set


@dataclass(frozen=True)
class Spelling:
    """One spelling of a flag.

    Attributes:
        flag: the spelling, as documented or as typed.
        option: the setting.
        value: the value that the flag sets, or TAKES_VALUE when it follows the flag.
        is_fallback: the flag holds only when nothing else sets the field.
    """

    flag: str
    option: Option
    value: Any = TAKES_VALUE
    is_fallback: bool = False


def normalize_flag(flag: str) -> str:
    """Return a flag with dashes for underscores: `--num_layers` and `--num-layers` are the same."""
    return "-" * (len(flag) - len(flag.lstrip("-"))) + flag.lstrip("-").replace("_", "-")


@cache
def spellings() -> Mapping[str, Spelling]:
    """Return all spellings, by the normalized flag."""
    table: dict[str, Spelling] = {}
    for o in options():
        value = TAKES_VALUE if o.kind is not bool else o.off_flag is None
        for flag in (o.flag, *o.aliases):
            table[normalize_flag(flag)] = Spelling(flag, o, value)
        for flag, constant in o.shortcuts.items():
            table[normalize_flag(flag)] = Spelling(flag, o, constant, flag in o.fallbacks)
    return table


def is_flag(word: str) -> bool:
    """Return whether a word of the command line is a flag; `-1e-5` is a value."""
    return re.match(r"--?[A-Za-z]", word) is not None


def known_flags() -> list[str]:
    """Return every flag that sets a field, as it is spelled."""
    return [s.flag for s in spellings().values()]


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """Return `; did you mean X or Y?`, or an empty string when no known word is similar."""
    alike = difflib.get_close_matches(word, known, n=3, cutoff=MIN_LIKENESS)
    near = [other for other in alike if _wrong_letters(word, other) <= MAX_WRONG_LETTERS]
    return f"; did you mean {' or '.join(near)}?" if near else ""


def _wrong_letters(word: str, other: str) -> int:
    """Return the number of letters in which two words differ."""
    edits = difflib.SequenceMatcher(None, word, other).get_opcodes()
    return sum(max(i2 - i1, j2 - j1) for tag, i1, i2, j1, j2 in edits if tag != "equal")


def name_here(word: str) -> str | None:
    """Return what a flag of another framework is called here, as in `is called --lr here`; None if it is unknown.

    A name with a dot, such as `train.global_batch_size`, may also be one of ours in a table of its own.
    """
    last = "--" + word.rpartition(".")[2]
    if "." in word and last in spellings():
        return find_other_framework(word) or f"{CALLED} {spellings()[last].flag} here"
    return find_other_framework(word)
