"""The options of a run, read off the schema: how each field is spelled and what it takes."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Union, get_args, get_origin, get_type_hints

from megatron.config.presets import PRESETS
from megatron.config.schema import option, sections


@dataclass(frozen=True)
class CommandConfig:
    """The command itself. These are not part of the run, and are not saved."""

    config: str | None = option(None, "a TOML file with the same settings; flags win over it", metavar="FILE")
    preset: str | None = option(None, "sizes of a known model; file and flags win over it", choices=tuple(PRESETS))
    dry_run: bool = option(False, "check everything and print what would run, in one CPU process; exit 0 or 2")
    world_size: int | None = option(None, "number of ranks that --dry-run assumes; default one")
    help: bool = option(False, "print this and exit", aliases=("-h",))
    version: bool = option(False, "print the version and exit")


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


@cache
def by_name() -> Mapping[str, Option]:
    """`section.field` -> option."""
    return {o.name: o for o in options()}


def flag_text(name: str, value: Any) -> str:
    """Return a setting as a user would type it, between backticks: `--num-layers 12`; an open value is left out."""
    o = by_name()[name]
    if o.kind is bool or value is None or value == ():
        return f"`{o.flag}`"
    return f"`{o.flag} {' '.join(map(str, value)) if o.many else value}`"
