"""Look up the spellings of the settings (flags, aliases and shortcuts), and suggest known ones for misspelled ones."""

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

MIN_SIMILARITY = 0.8  # difflib's ratio; spellings that resemble the typed word less are not suggested
MAX_WRONG_LETTERS = 3  # a second limit: between long flags, the ratio alone accepts unrelated words
TAKES_VALUE: Any = object()  # sentinel for `Spelling.value`, distinct from every value that a flag can set


@dataclass(frozen=True)
class Spelling:
    """One spelling of a flag.

    Attributes:
        flag: the spelling, as documented or as typed.
        option: the setting.
        value: the value that the flag sets; TAKES_VALUE if the value is the word after the flag.
        is_fallback: the flag applies only if nothing else sets the field.
    """

    flag: str
    option: Option
    value: Any = TAKES_VALUE
    is_fallback: bool = False


def normalize_flag(flag: str) -> str:
    """Return a flag with its underscores replaced by dashes: `--num_layers` becomes `--num-layers`."""
    return "-" * (len(flag) - len(flag.lstrip("-"))) + flag.lstrip("-").replace("_", "-")


@cache
def spellings() -> Mapping[str, Spelling]:
    """Return all spellings of all settings, by normalized flag."""
    table: dict[str, Spelling] = {}
    for o in options():
        value = TAKES_VALUE if o.kind is not bool else o.off_flag is None
        for flag in (o.flag, *o.aliases):
            table[normalize_flag(flag)] = Spelling(flag, o, value)
        for flag, constant in o.shortcuts.items():
            table[normalize_flag(flag)] = Spelling(flag, o, constant, flag in o.fallbacks)
    return table


def is_flag(word: str) -> bool:
    """Return whether a word of the command line has the form of a flag; `-1e-5` is a value."""
    return re.match(r"--?[A-Za-z]", word) is not None


def known_flags() -> list[str]:
    """Return every flag that sets a field, in its documented spelling."""
    return [s.flag for s in spellings().values()]


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """Return `; did you mean X or Y?`, or an empty string when no known word is similar."""
    similar = difflib.get_close_matches(word, known, n=3, cutoff=MIN_SIMILARITY)
    suggestions = [other for other in similar if _wrong_letters(word, other) <= MAX_WRONG_LETTERS]
    return f"; did you mean {' or '.join(suggestions)}?" if suggestions else ""


def _wrong_letters(word: str, other: str) -> int:
    """Return the number of letters in which two words differ."""
    edits = difflib.SequenceMatcher(None, word, other).get_opcodes()
    return sum(max(i2 - i1, j2 - j1) for tag, i1, i2, j1, j2 in edits if tag != "equal")


def our_name_for(word: str) -> str | None:
    """Return a message that names our flag for a flag of another framework, `is called --lr here`; None if it is unknown.

    For a name with a dot, such as `train.global_batch_size`, the part after the last dot may also be one of our flags.

    Args:
        word: the normalized flag, without leading dashes.
    """
    last = "--" + word.rpartition(".")[2]
    if "." in word and last in spellings():
        return find_other_framework(word) or f"{CALLED} {spellings()[last].flag} here"
    return find_other_framework(word)
