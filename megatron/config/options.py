"""The options of a run, read off the schema: how each field is spelled, what it takes, and text to value."""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Union, get_args, get_origin, get_type_hints

from megatron.config.other_flags.refused import VALUES
from megatron.config.presets import PRESETS
from megatron.config.schema import RunConfig, option


@dataclass(frozen=True)
class CommandConfig:
    """The command itself. These are not part of the run, and are not saved."""

    config: str | None = option(None, "a TOML file with the same settings; flags win over it", metavar="FILE")
    preset: str | None = option(None, "sizes of a known model; file and flags win over it", choices=tuple(PRESETS))
    dry_run: bool = option(False, "check everything and print what would run, in one CPU process; exit 0 or 2")
    world_size: int | None = option(None, "number of ranks that --dry-run assumes; default one")
    help: bool = option(False, "print this and exit", aliases=("-h",))
    version: bool = option(False, "print the version and exit")


NAMES_OF_FILES = ("checkpoint", "data", "tokenizer")  # sections whose words name files, or what is in them


@dataclass(frozen=True)
class Option:
    """One field that a user can set. `default` is the schema's; `flag` the spelling that messages use.

    bare: what the flag sets without a value; None where it needs one.
    """

    section: str
    field: str
    kind: type
    many: bool
    default: Any
    help: str
    flag: str
    off: str | None
    aliases: tuple[str, ...]
    choices: tuple[str, ...] | None
    constants: Mapping[str, Any]
    yielding: tuple[str, ...]
    metavar: str | None
    bare: str | None

    @property
    def name(self) -> str:
        """`section.field`, unique over a run."""
        return f"{self.section}.{self.field}"

    def convert(self, text: str) -> Any:
        """The value that `text` means. ValueError saying what it is not."""
        if self.kind is int:
            try:
                return int(text)
            except ValueError:
                raise ValueError("is not an integer") from None
        if self.kind is float:
            try:
                number = float(text)
            except ValueError:
                raise ValueError("is not a number") from None
            if not math.isfinite(number):
                raise ValueError("is not a finite number")
            return number
        if self.choices and text not in self.choices:
            elsewhere = VALUES.get(self.flag, {}).get(text)
            raise ValueError(elsewhere or f"is not known; legal: {', '.join(self.choices)}")
        if not text and self.section in NAMES_OF_FILES:
            raise ValueError("is empty")
        return text

    def accept(self, value: Any) -> Any:
        """A TOML or JSON value as the field holds it. ValueError saying what it is not."""
        if self.many:
            items = value if isinstance(value, (list, tuple)) else [value]
            return tuple(self._accept_one(item) for item in items)
        return self._accept_one(value)

    def _accept_one(self, value: Any) -> Any:
        if self.bare is not None and isinstance(value, bool):
            return self.bare if value else self.default
        if self.kind is bool or isinstance(value, bool):
            if self.kind is bool and isinstance(value, bool):
                return value
            raise ValueError("must be true or false" if self.kind is bool else "cannot be true or false")
        if self.kind is int and not isinstance(value, int):
            raise ValueError("is not an integer")
        if self.kind is float and not isinstance(value, (int, float)):
            raise ValueError("is not a number")
        if self.kind is str and not isinstance(value, (str, int, float) if self.many else str):
            raise ValueError("is not a string")
        return self.convert(str(value))


TAKES_VALUE: Any = object()


@dataclass(frozen=True)
class Spelling:
    """One flag as typed. `value` is what it sets, or TAKES_VALUE when the value follows; whether it `yields` to others."""

    flag: str
    option: Option
    value: Any = TAKES_VALUE
    yields: bool = False


def sections() -> dict[str, type]:
    """Name and dataclass of every section of a run, in order."""
    return dict(get_type_hints(RunConfig))


@cache
def options() -> tuple[Option, ...]:
    """Every field that has a flag, in the schema's order."""
    found = []
    for section, config in {"command": CommandConfig, **sections()}.items():
        hints = get_type_hints(config)
        for f in dataclasses.fields(config):
            meta = f.metadata
            if meta["flag"] is None:
                continue
            kind, many = _kind(hints[f.name])
            flag = meta["off"] or meta["flag"] or "--" + f.name.replace("_", "-")
            found.append(
                Option(
                    section, f.name, kind, many, f.default, meta["help"], flag, meta["off"],
                    meta["aliases"], meta["choices"], meta["values"], meta["yielding"], meta["metavar"], meta["bare"],
                )
            )  # fmt: skip
    return tuple(found)


def _kind(hint: Any) -> tuple[type, bool]:
    """(type of one value, whether there are several) of a field's annotation."""
    if get_origin(hint) in (Union, types.UnionType):
        (hint,) = (a for a in get_args(hint) if a is not type(None))
    if get_origin(hint) is tuple:
        return get_args(hint)[0], True
    return hint, False


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


@cache
def by_name() -> Mapping[str, Option]:
    """`section.field` -> option."""
    return {o.name: o for o in options()}


def say(name: str, value: Any) -> str:
    """A setting as a user would type it, between backticks: `--num-layers 12`; a value that is still open is left out."""
    o = by_name()[name]
    if o.kind is bool or value is None or value == ():
        return f"`{o.flag}`"
    return f"`{o.flag} {' '.join(map(str, value)) if o.many else value}`"
