"""Read a command line into settings, collecting all mistakes instead of stopping at the first.

It accepts what argparse accepts in Megatron-LM's scripts: `--flag value` and `--flag=value`, unambiguous prefixes of a flag,
and several values after `--data-path`. If a flag is repeated, the last value wins. The value of some flags is optional.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron.config.command_line.other_flags.table import OtherFlag, find_other, other_flags
from megatron.config.command_line.reading import Reading, leading_values
from megatron.config.command_line.spelling import (
    TAKES_VALUE,
    Spelling,
    did_you_mean,
    is_flag,
    known_flags,
    normalize_flag,
    our_name_for,
    spellings,
)
from megatron.config.errors import Problem


def read_arguments(argv: Sequence[str]) -> Reading:
    """Read the settings of a command line."""
    reading = Reading()
    words = list(argv)
    while words:
        word = words.pop(0)
        if not is_flag(word):
            reading.problems.append(Problem(f"`{word}`", "belongs to no flag"))
            continue
        typed, has_value, attached = word.partition("=")
        found = _find(typed, reading)
        following = [attached] if has_value else leading_values(words)
        if found is None:  # the flag has been reported; skip its values, so that they are not reported as well
            del words[: 0 if has_value else len(following)]
            continue
        takes = found.takes if isinstance(found, OtherFlag) else _takes(found)
        values = following if takes == "*" or has_value else following[: 1 if takes == "?" else int(takes)]
        if not has_value:
            del words[: len(values)]
        if isinstance(found, OtherFlag):
            reading.take_other(found, typed, values)
        elif takes == "0" and has_value:
            reading.record_unreadable(found.option, f"`{word}`", "takes no value")
        elif takes == "1" and not values:
            reading.record_unreadable(found.option, f"`{found.flag}`", "needs a value after it")
        else:
            reading.take(found, values)
    return reading.finish()


def _takes(spelling: Spelling) -> str:
    """Return the number of values that a flag takes: "0", "1", "*" for any number, or "?" for an optional value."""
    if spelling.value is not TAKES_VALUE:
        return "0"
    if spelling.option.bare is not None:
        return "?"
    return "*" if spelling.option.many else "1"


def _find(typed: str, reading: Reading) -> Spelling | OtherFlag | None:
    """Return the flag that was typed, in full or as an unambiguous prefix. Records a mistake and returns None for others."""
    word = normalize_flag(typed)
    if exact := spellings().get(word) or find_other(word):
        return exact
    # Before prefixes are tried: `--data` is a flag of other frameworks, and also a prefix of several flags here.
    if answer := our_name_for(word.lstrip("-")):
        reading.record_unknown(f"`{typed}`", answer)
        return None
    known = (*spellings(), *other_flags())
    matches = [key for key in known if word.startswith("--") and len(word) > 2 and key.startswith(word)]
    if len({_meaning(key) for key in matches}) == 1:
        found = spellings().get(matches[0]) or other_flags()[matches[0]]
        reading.notes.append(f"{typed} is read as {found.flag}")
        return found
    if matches:
        # If several of them set a field, name only these, without those that have no effect or are refused.
        own = [key for key in matches if key in spellings()]
        shown = own if len(own) > 1 else matches
        reading.problems.append(Problem(f"`{typed}`", f"could be {', '.join(shown[:4])}{', ...' if len(shown) > 4 else ''}"))
    else:
        hint = did_you_mean(typed, known_flags()) or "; --help lists all"
        reading.record_unknown(f"`{typed}`", "is not a known flag" + hint)
    return None


def _meaning(key: str) -> tuple[str, str]:
    """Return the setting and the value of a flag as a tuple, which is equal for two flags that do the same."""
    spelling = spellings().get(key)
    return (key, "") if spelling is None else (spelling.option.name, repr(spelling.value))
