"""Read a command line into settings, collecting all mistakes instead of stopping at the first.

It accepts what argparse accepts in Megatron-LM's scripts: `--flag value` and `--flag=value`, unambiguous prefixes of a flag,
several values after `--data-path`; the last of two equal flags wins. The value of some flags is optional.
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
    name_here,
    normalize_flag,
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
        if found is None:  # its values mean nothing either, and are no mistakes of their own
            del words[: 0 if has_value else len(following)]
            continue
        takes = found.takes if isinstance(found, OtherFlag) else _takes(found)
        used = following if takes == "*" or has_value else following[: 1 if takes == "?" else int(takes)]
        if not has_value:
            del words[: len(used)]
        if isinstance(found, OtherFlag):
            reading.take_other(found, typed, used)
        elif takes == "0" and has_value:
            reading.record_unreadable(found.option, f"`{word}`", "takes no value")
        elif takes == "1" and not used:
            reading.record_unreadable(found.option, f"`{found.flag}`", "needs a value after it")
        else:
            reading.take(found, used)
    return reading.finish()


def _takes(spelling: Spelling) -> str:
    """Return the number of values of a flag, in the notation of `OtherFlag.takes`; "?" for an optional one."""
    if spelling.value is not TAKES_VALUE:
        return "0"
    if spelling.option.bare is not None:
        return "?"
    return "*" if spelling.option.many else "1"


def _find(typed: str, reading: Reading) -> Spelling | OtherFlag | None:
    """Return the flag that was typed, in full or as an unambiguous prefix; None, with a recorded mistake, for others."""
    word = normalize_flag(typed)
    if exact := spellings().get(word) or find_other(word):
        return exact
    # Before prefixes: `--data` means something in other frameworks, and is the beginning of several flags here.
    if answer := name_here(word.lstrip("-")):
        reading.record_unknown(f"`{typed}`", answer)
        return None
    known = (*spellings(), *other_flags())
    begun = [key for key in known if word.startswith("--") and len(word) > 2 and key.startswith(word)]
    if len({_meaning(key) for key in begun}) == 1:
        found = spellings().get(begun[0]) or other_flags()[begun[0]]
        reading.notes.append(f"{typed} is read as {found.flag}")
        return found
    if begun:
        own = [key for key in begun if key in spellings()]  # rather than flags that are accepted without effect, or refused
        shown = own if len(own) > 1 else begun
        reading.problems.append(Problem(f"`{typed}`", f"could be {', '.join(shown[:4])}{', ...' if len(shown) > 4 else ''}"))
    else:
        hint = did_you_mean(typed, known_flags()) or "; --help lists all"
        reading.record_unknown(f"`{typed}`", "is not a known flag" + hint)
    return None


def _meaning(key: str) -> tuple[str, str]:
    """Return a key that is equal for two spellings of one flag."""
    spelling = spellings().get(key)
    return (key, "") if spelling is None else (spelling.option.name, repr(spelling.value))
