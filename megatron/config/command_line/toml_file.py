"""Read a TOML file into settings. Its tables are the sections of a run, its keys the flags without leading dashes."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping
from typing import Any

from megatron.config.command_line.other_flags.table import find_other
from megatron.config.command_line.reading import Reading
from megatron.config.command_line.spelling import TAKES_VALUE, Spelling, did_you_mean, our_name_for, spellings
from megatron.config.command_line.values import coerce
from megatron.config.errors import Problem
from megatron.config.options import options
from megatron.config.schema import sections
from megatron.files.foreign import recognize_file
from megatron.files.regular import MAX_TOML_BYTES, read_text


def read_toml(path: str) -> Reading:
    """Read the settings of a TOML file, which has a table for each section of `RunSettings`.

    Keys are flags without leading dashes, or names of the schema's fields; `-` and `_` are interchangeable. `preset` belongs
    before the first table.
    """
    reading = Reading()
    reading.broken = True  # until the file has been parsed
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
        if (found := recognize_file(path)) is not None:  # the kind of file helps more than the parser's position
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
            rule = f"is not a section of a run{did_you_mean(name, list(sections()))}"
            reading.problems.append(Problem(f"`[{name}]` in {path}", rule, ", ".join(sections())))
            reading.broken = True
        else:
            _record_unknown_key(reading, path, "", name)
    return reading.finish()


def _keys(section: str) -> dict[str, Spelling]:
    """Return the keys that one table accepts: every flag of the section, and the name of every field."""
    table = {key.lstrip("-"): s for key, s in spellings().items() if s.option.section == section}
    table |= {o.field.replace("_", "-"): Spelling(o.flag, o) for o in options() if o.section == section}
    return table


def _take_key(reading: Reading, path: str, section: str, key: str, value: Any) -> None:
    """Set the field that a key of a section names, or record the mistake in the key or in its value."""
    known = _keys(section)
    word = key.replace("_", "-")
    where = f"`{key} = {_as_toml(value)}` in {path}"
    if word not in known:
        if row := find_other("--" + word):  # flags that are ignored or refused on the command line are treated alike here
            if value is not False:  # a switch that is off is the same as no switch
                items = value if isinstance(value, list) else [] if value is True else [value]
                reading.take_other(row, key, [str(item) for item in items], f" in {path}")
            return
        _record_unknown_key(reading, path, section, key)
        return
    spelling = known[word]
    try:
        if spelling.value is TAKES_VALUE:
            reading.assign(spelling.option, coerce(spelling.option, value), key)
        elif not isinstance(value, bool):
            raise ValueError("must be true or false")
        elif value:
            reading.take(dataclasses.replace(spelling, flag=key), [])
    except ValueError as error:
        reading.record_unreadable(spelling.option, where, str(error))


def _record_unknown_key(reading: Reading, path: str, section: str, key: str) -> None:
    """Record an unknown key, with the section that it belongs to or the known key that it resembles."""
    word = key.replace("_", "-")
    right_sections = [name for name in sections() if word in _keys(name)]
    place = f" under [{section}]" if section else " before the first table"
    rule = "is not a known key"
    if right_sections:
        rule += f"; it belongs under [{right_sections[0]}]"
        reading.invalid.add(_keys(right_sections[0])[word].option.name)  # so that it is not also reported as missing
    else:
        near = did_you_mean(word, [known for name in ([section] if section else sections()) for known in _keys(name)])
        rule = rule + near if near else (our_name_for(word) or rule)
    reading.record_unknown(f"`{key}`{place} in {path}", rule)


def _as_toml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value)
