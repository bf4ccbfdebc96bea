"""Reads a command line and a TOML file into settings, collecting every mistake instead of stopping at the first.

The command line follows the habits of Megatron-LM's scripts: `--flag value` and `--flag=value`, unambiguous prefixes of
a flag, several values after `--data-path`, the last of two equal flags wins. Some flags may stand without their value.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron.config.errors import Problem
from megatron.config.options import TAKES_VALUE, Option, Spelling, options, plain, sections, spellings
from megatron.config.other_flags.other_frameworks import CALLED, HOW_LONG, meaning_elsewhere
from megatron.config.other_flags.table import VALUE, OtherFlag, find_other, other_flags
from megatron.files.foreign import foreign_file
from megatron.files.regular import MAX_TOML_BYTES, read_text

BELONGS = "belongs to "  # how the rule of a feature that is not there begins
MIN_LIKENESS = 0.8  # difflib's ratio from which a spelling counts as near
MAX_WRONG_LETTERS = 3


@dataclass
class Reading:
    """What one source says: `section.field` -> value. `bad` names fields whose value could not be read.

    yielding: values that hold only where no other source and no other flag sets the field to something of its own.
    meant: fields that an unknown flag seems to mean, so that nobody says they are missing too.
    broken: whole tables of it could not be read, so what is missing is no mistake of its own.
    """

    values: dict[str, Any] = field(default_factory=dict)
    yielding: dict[str, Spelling] = field(default_factory=dict)
    spelled: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    bad: set[str] = field(default_factory=set)
    meant: set[str] = field(default_factory=set)
    broken: bool = False

    def set(self, option: Option, value: Any, how: str) -> None:
        """Take a value. Two spellings of one setting that disagree are a mistake.

        Args:
            option: the setting.
            value: its value, of the field's type.
            how: the flag or key as the user spelled it.
        """
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

    def closed(self) -> Reading:
        """Return this at the end of its source: one message for one feature, and for one cause."""
        self.problems = by_feature(self.problems)
        self.bad |= self.meant - self.values.keys()
        return self

    def unknown(self, what: str, rule: str) -> None:
        """Record a flag or key that is none of ours, and the fields that `rule` sends the user to."""
        self.problems.append(Problem(what, rule))
        words = re.findall(r"--[a-z0-9-]+", rule) if rule.startswith((CALLED, HOW_LONG)) else []
        words += rule.partition("; did you mean ")[2].rstrip("?").split(" or ")  # keys of a file have no dashes before them
        named = (spellings().get("--" + word.lstrip("-")) for word in words)
        self.meant |= {spelling.option.name for spelling in named if spelling}

    def take_other(self, row: OtherFlag, typed: str, values: Sequence[str], where: str = "") -> None:
        """Take a flag that is no field: as the flags that it is read as, as a note, or as a mistake.

        Args:
            row: what is known of the flag.
            typed: the flag or key as the user spelled it.
            values: the words after it.
            where: ` in FILE` for a key of one.
        """
        whole = " ".join([typed, *values]) + where
        if row.means and row.takes == "1" and not values:
            self.problems.append(Problem(f"`{typed}`{where}", "needs a value after it"))
        elif row.means:
            words = [values[0] if word == VALUE else word for word in row.means]
            self.notes.append(f"{whole} is read as {' '.join(words)}")
            while words:
                spelling = dataclasses.replace(spellings()[plain(words.pop(0))], flag=typed)
                following = _values(words)
                del words[: len(following)]
                _take(self, spelling, following)
        elif row.accepts(values):
            why = "it asks for nothing that is not there" if row.refused else row.text
            self.notes.append(f"{whole} changes nothing: {why}")
        elif row.legal and not row.refused:
            self.problems.append(Problem(f"`{whole}`", f"is not available: {row.text}", " or ".join(row.legal)))
        else:
            self.problems.append(Problem(f"`{whole if row.legal else typed + where}`", row.text))


def nearest(word: str, known: Sequence[str]) -> str:
    """Return `; did you mean X or Y?`, and for a word that is near to none an empty string."""
    alike = difflib.get_close_matches(word, known, n=3, cutoff=MIN_LIKENESS)
    near = [other for other in alike if _wrong_letters(word, other) <= MAX_WRONG_LETTERS]
    return f"; did you mean {' or '.join(near)}?" if near else ""


def _wrong_letters(word: str, other: str) -> int:
    edits = difflib.SequenceMatcher(None, word, other).get_opcodes()
    return sum(max(i2 - i1, j2 - j1) for tag, i1, i2, j1, j2 in edits if tag != "equal")


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
        takes = found.takes if isinstance(found, OtherFlag) else _takes(found)
        used = following if takes == "*" or has_value else following[: 1 if takes == "?" else int(takes)]
        if not has_value:
            del words[: len(used)]
        if isinstance(found, OtherFlag):
            reading.take_other(found, typed, used)
        elif takes == "0" and has_value:
            reading.refuse(found.option, f"`{word}`", "takes no value")
        elif takes == "1" and not used:
            reading.refuse(found.option, f"`{found.flag}`", "needs a value after it")
        else:
            _take(reading, found, used)
    return reading.closed()


def by_feature(problems: Sequence[Problem]) -> list[Problem]:
    """Say of a feature that is not there once what several flags ask of it."""
    merged: dict[str, list[str]] = {}
    for problem in problems:
        merged.setdefault(problem.rule if problem.rule.startswith(BELONGS) else str(problem), []).append(problem.what)
    rest = []
    for problem in problems:
        same = list(dict.fromkeys(merged.pop(problem.rule, ())))
        if len(same) > 1:
            what = f"{', '.join(same[:-1])} and {same[-1]}"
            rest.append(Problem(what, "belong to " + problem.rule.removeprefix(BELONGS)))
        elif same or not problem.rule.startswith(BELONGS):
            rest.append(problem)
    return rest


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
    if spelling.yields:
        reading.yielding[option.name] = spelling
        return
    if spelling.value is not TAKES_VALUE:
        reading.set(option, spelling.value, spelling.flag)
        return
    if not words and option.bare is not None:
        words = [option.bare]
    if option.many and option.kind is int:
        words = _without_brackets(words)
    try:
        values = [option.convert(word) for word in words]
    except ValueError as error:
        reading.refuse(option, f"`{' '.join([spelling.flag, *words])}`", str(error))
        return
    reading.set(option, tuple(values) if option.many else values[0], spelling.flag)


def _without_brackets(words: Sequence[str]) -> Sequence[str]:
    """Numbers as a YAML file holds them, `[384 384 97656250]` in one word or several, as one word each."""
    text = " ".join(words)
    return text[1:-1].replace(",", " ").split() if text.startswith("[") and text.endswith("]") else words


def _find(typed: str, reading: Reading) -> Spelling | OtherFlag | None:
    """Return the flag that was typed, in full or as an unambiguous prefix; else record a mistake."""
    word = plain(typed)
    if exact := spellings().get(word) or find_other(word):
        return exact
    if answer := _elsewhere(word.lstrip("-")):
        reading.unknown(f"`{typed}`", answer)
        return None
    known = (*spellings(), *other_flags())
    begun = [key for key in known if word.startswith("--") and len(word) > 2 and key.startswith(word)]
    if len({_meaning(key) for key in begun}) == 1:
        found = spellings().get(begun[0]) or other_flags()[begun[0]]
        reading.notes.append(f"{typed} is read as {found.flag}")
        return found
    if begun:
        own = [key for key in begun if key in spellings()]
        shown = own if len(own) > 1 else begun
        reading.problems.append(Problem(f"`{typed}`", f"could be {', '.join(shown[:4])}{', ...' if len(shown) > 4 else ''}"))
    else:
        hint = nearest(typed, known_flags()) or "; --help lists all"
        reading.unknown(f"`{typed}`", "is not a known flag" + hint)
    return None


def _elsewhere(word: str) -> str | None:
    """Return what a flag of another framework is here, `train.global_batch_size` included; None if nothing is known of it."""
    last = "--" + word.rpartition(".")[2]
    if "." in word and last in spellings():
        return meaning_elsewhere(word) or f"{CALLED} {spellings()[last].flag} here"
    return meaning_elsewhere(word)


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
    return reading.closed()


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
        if row := find_other("--" + word):
            if value is not False:
                items = value if isinstance(value, list) else [] if value is True else [value]
                reading.take_other(row, key, [str(item) for item in items], f" in {path}")
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
            _take(reading, dataclasses.replace(spelling, flag=key), [])
    except ValueError as error:
        reading.refuse(spelling.option, where, str(error))


def _unknown_key(reading: Reading, path: str, section: str, key: str) -> None:
    word = key.replace("_", "-")
    homes = [name for name in sections() if word in _keys(name)]
    place = f" under [{section}]" if section else " before the first table"
    rule = "is not a known key"
    if homes:
        rule += f"; it belongs under [{homes[0]}]"
        reading.bad.add(_keys(homes[0])[word].option.name)  # which is not missing as well
    else:
        near = nearest(word, [known for name in ([section] if section else sections()) for known in _keys(name)])
        rule = rule + near if near else (_elsewhere(word) or rule)
    reading.unknown(f"`{key}`{place} in {path}", rule)


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value)
