"""Reads a command line and a TOML file into settings, collecting every mistake instead of stopping at the first.

The command line follows the habits of Megatron-LM's scripts: `--flag value` and `--flag=value`, unambiguous prefixes of
a flag, several values after `--data-path`, the last of two equal flags wins. Some flags may stand without their value.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron.config.errors import Problem
from megatron.config.legacy import LEGACY, Legacy
from megatron.config.options import TAKES_VALUE, Option, Spelling, options, plain, sections, spellings
from megatron.files.foreign import foreign_file
from megatron.files.regular import MAX_TOML_BYTES, read_text


@dataclass
class Reading:
    """What one source says: `section.field` -> value. `bad` names fields whose value could not be read.

    `broken`: whole tables of it could not be read, so what is missing is no mistake of its own.
    """

    values: dict[str, Any] = field(default_factory=dict)
    spelled: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    bad: set[str] = field(default_factory=set)
    broken: bool = False

    def set(self, option: Option, value: Any, how: str) -> None:
        """Take a value. Two spellings of one setting that disagree are a mistake."""
        before = self.values.get(option.name, value)
        if before != value and self.spelled[option.name] != how:
            both = f"`{self.spelled[option.name]}` and `{how}`"
            self.problems.append(Problem(both, "set the same thing to different values"))
        self.values[option.name] = value
        self.spelled[option.name] = how

    def refuse(self, option: Option, what: str, rule: str) -> None:
        """Record a value that cannot be read."""
        self.problems.append(Problem(what, rule))
        self.bad.add(option.name)

    def legacy(self, row: Legacy, typed: str, values: Sequence[str]) -> None:
        """Take a flag that sets nothing: a note, or a mistake."""
        if row.refused:
            self.problems.append(Problem(f"`{typed}`", row.text))
        elif row.legal and values and values[0] not in row.legal:
            self.problems.append(Problem(f"`{typed} {values[0]}`", f"is not available: {row.text}", " or ".join(row.legal)))
        else:
            self.notes.append(f"{' '.join([typed, *values])} changes nothing: {row.text}")


def nearest(word: str, known: Sequence[str]) -> str:
    """`; did you mean X or Y?`, and for a word that is near to none `; the nearest is X`."""
    near = difflib.get_close_matches(word, known, n=3, cutoff=0.6)
    if near:
        return f"; did you mean {' or '.join(near)}?"
    return f"; the nearest is {difflib.get_close_matches(word, known, n=1, cutoff=0.0)[0]}" if known else ""


def is_flag(word: str) -> bool:
    """Whether a word of the command line is a flag; `-1e-5` is a value."""
    return re.match(r"--?[A-Za-z]", word) is not None


def known_flags() -> list[str]:
    """Every flag that means something, as it is spelled."""
    return [s.flag for s in spellings().values()]


def read_arguments(argv: Sequence[str]) -> Reading:
    """Settings of a command line."""
    reading = Reading()
    words = list(argv)
    while words:
        word = words.pop(0)
        if not is_flag(word):
            reading.problems.append(Problem(f"`{word}`", "belongs to no flag"))
            continue
        typed, has_value, attached = word.partition("=")
        found = _find(typed, reading)
        following = [attached] if has_value else _values(words)
        if found is None:  # its values are unknown too: say nothing more about them
            del words[: 0 if has_value else len(following)]
            continue
        takes = found.takes if isinstance(found, Legacy) else _takes(found)
        used = following if takes == "*" or has_value else following[: 1 if takes == "?" else int(takes)]
        if not has_value:
            del words[: len(used)]
        if isinstance(found, Legacy):
            reading.legacy(found, typed, used)
        elif takes == "0" and has_value:
            reading.refuse(found.option, f"`{word}`", "takes no value")
        elif takes == "1" and not used:
            reading.refuse(found.option, f"`{found.flag}`", "needs a value after it")
        else:
            _take(reading, found, used)
    return reading


def _values(words: Sequence[str]) -> list[str]:
    """The words before the next flag."""
    end = next((i for i, word in enumerate(words) if is_flag(word)), len(words))
    return list(words[:end])


def _takes(spelling: Spelling) -> str:
    if spelling.value is not TAKES_VALUE:
        return "0"
    if spelling.option.bare is not None:
        return "?"
    return "*" if spelling.option.many else "1"


def _take(reading: Reading, spelling: Spelling, words: Sequence[str]) -> None:
    option = spelling.option
    if spelling.value is not TAKES_VALUE:
        reading.set(option, spelling.value, spelling.flag)
        return
    if not words and option.bare is not None:
        words = [option.bare]
    try:
        values = [option.convert(word) for word in words]
    except ValueError as error:
        reading.refuse(option, f"`{' '.join([spelling.flag, *words])}`", str(error))
        return
    reading.set(option, tuple(values) if option.many else values[0], spelling.flag)


def _find(typed: str, reading: Reading) -> Spelling | Legacy | None:
    """The flag that was typed, in full or as an unambiguous prefix; else a mistake is recorded."""
    word = plain(typed)
    if exact := spellings().get(word) or LEGACY.get(word):
        return exact
    begun = [key for key in (*spellings(), *LEGACY) if word.startswith("--") and len(word) > 2 and key.startswith(word)]
    if len({_meaning(key) for key in begun}) == 1:
        found = spellings().get(begun[0]) or LEGACY[begun[0]]
        reading.notes.append(f"{typed} is read as {found.flag}")
        return found
    if begun:
        reading.problems.append(Problem(f"`{typed}`", f"could be {', '.join(begun[:4])}{', ...' if len(begun) > 4 else ''}"))
    else:
        reading.problems.append(Problem(f"`{typed}`", "is not a known flag" + nearest(typed, known_flags())))
    return None


def _meaning(key: str) -> tuple[str, str]:
    """Equal for two spellings of one flag."""
    spelling = spellings().get(key)
    return (key, "") if spelling is None else (spelling.option.name, repr(spelling.value))


def read_toml(path: str) -> Reading:
    """Settings of a TOML file: a table per section of `RunConfig`, keys as the flags without their dashes or as the
    schema's fields, `-` and `_` alike; `preset` stands before the first table."""
    reading = Reading()
    reading.broken = True
    try:
        data = tomllib.loads(read_text(path, MAX_TOML_BYTES).removeprefix("\N{ZERO WIDTH NO-BREAK SPACE}"))
    except OSError as error:
        reading.problems.append(Problem(f"`--config {path}`", f"cannot be read: {error.strerror}"))
        return reading
    except UnicodeDecodeError:
        reading.problems.append(Problem(f"`--config {path}`", "is not a text file in UTF-8"))
        return reading
    except RecursionError:
        reading.problems.append(Problem(f"`--config {path}`", "is nested too deeply"))
        return reading
    except ValueError as error:  # TOMLDecodeError, and a number with too many digits
        if (found := foreign_file(path)) is not None:
            reading.problems.append(Problem(f"`--config {path}`", f"is {found}"))
            return reading
        reading.problems.append(Problem(f"`--config {path}`", f"is not valid TOML: {error}"))
        return reading
    reading.broken = False
    for name, table in data.items():
        if name in sections() and isinstance(table, Mapping):
            for key, value in table.items():
                _take_key(reading, path, name, key, value)
        elif name == "preset":
            _take_key(reading, path, "command", name, table)
        elif isinstance(table, Mapping):
            rule = f"is not a table of a run{nearest(name, list(sections()))}"
            reading.problems.append(Problem(f"`[{name}]` in {path}", rule, ", ".join(sections())))
            reading.broken = True
        else:
            _unknown_key(reading, path, "", name)
    return reading


def _keys(section: str) -> dict[str, Spelling]:
    """Key -> what it sets, for one table: every flag of the section, and every field by its own name."""
    table = {key.lstrip("-"): s for key, s in spellings().items() if s.option.section == section}
    table |= {o.field.replace("_", "-"): Spelling(o.flag, o) for o in options() if o.section == section}
    return table


def _take_key(reading: Reading, path: str, section: str, key: str, value: Any) -> None:
    known = _keys(section)
    word = key.replace("_", "-")
    where = f"`{key} = {_shown(value)}` in {path}"
    if word not in known:
        if row := LEGACY.get("--" + word):
            if value is not False:
                reading.legacy(row, f"{key} in {path}", [] if value is True else [str(value)])
            return
        _unknown_key(reading, path, section, key)
        return
    spelling = known[word]
    try:
        if spelling.value is TAKES_VALUE:
            reading.set(spelling.option, spelling.option.accept(value), key)
        elif not isinstance(value, bool):
            raise ValueError("must be true or false")
        elif value:
            reading.set(spelling.option, spelling.value, key)
    except ValueError as error:
        reading.refuse(spelling.option, where, str(error))


def _unknown_key(reading: Reading, path: str, section: str, key: str) -> None:
    word = key.replace("_", "-")
    homes = [name for name in sections() if word in _keys(name)]
    place = f" under [{section}]" if section else " before the first table"
    if homes:
        hint = f"; it belongs under [{homes[0]}]"
        reading.bad.add(_keys(homes[0])[word].option.name)  # which is not missing as well
    else:
        keys = {key: spelling for name in ([section] if section else sections()) for key, spelling in _keys(name).items()}
        hint = nearest(word, list(keys))
        # What was meant is not missing as well.
        reading.bad |= {keys[key].option.name for key in difflib.get_close_matches(word, keys, n=1, cutoff=0.6)}
    reading.problems.append(Problem(f"`{key}`{place} in {path}", "is not a known key" + hint))


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value)
