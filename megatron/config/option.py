"""Dataclass fields that know their flag, their help and their legal values."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Union, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class Range:
    """Legal range of a number: `holds` tests it, and `text` describes it after "must be"."""

    text: str
    holds: Callable[[Any], bool]


POSITIVE = Range("greater than 0", lambda v: v > 0)
NOT_NEGATIVE = Range("0 or greater", lambda v: v >= 0)
FROM_0_BELOW_1 = Range("at least 0 and less than 1", lambda v: 0 <= v < 1)
BETWEEN_0_AND_1 = Range("greater than 0 and less than 1", lambda v: 0 < v < 1)
FROM_0_TO_1 = Range("from 0 to 1", lambda v: 0 <= v <= 1)
ABOVE_0_TO_1 = Range("greater than 0 and at most 1", lambda v: 0 < v <= 1)
MAX_TOKENS = 1 << 24  # a vocabulary read from a file may not be larger; the largest known ones have about a million tokens
# Layers and micro-batches are enumerated one by one in schedules and tables, so a typing error must not ask for billions.
LAYERS = Range("greater than 0 and at most 65,536", lambda v: 0 < v <= 1 << 16)
SAMPLES = Range("greater than 0 and at most 1,048,576", lambda v: 0 < v <= 1 << 20)


def option(
    default: Any,
    help: str,
    *,
    flag: str | None = "",
    off_flag: str | None = None,
    aliases: tuple[str, ...] = (),
    choices: tuple[str, ...] | None = None,
    shortcuts: Mapping[str, Any] | None = None,
    fallbacks: tuple[str, ...] = (),
    metavar: str | None = None,
    bare: str | None = None,
    legal: Range | None = None,
) -> Any:
    """Declare a dataclass field that a user can set.

    Args:
        default: the field's default.
        help: text for --help: what the value is, with its unit, or what a switch does; for a switch that is on by default, a
            noun phrase after "turns off". A default that follows from other settings stands at its end: "(default: --lr)".
        flag: spelling of the flag, if it is not the field's name with dashes; None for a field that no flag sets.
        off_flag: flag that turns off a bool whose default is True.
        aliases: other spellings of the same flag.
        choices: the legal strings.
        shortcuts: further flags without a value, and the value to which each sets this field
            (`--use-rotary-position-embeddings` sets `position_embedding_type` to "rope").
        fallbacks: those of `shortcuts` that only hold when nothing else sets the field.
        metavar: name of the value in --help; by default N, X or TEXT.
        bare: value that the flag sets when it is given without one; in TOML, the value of `true`.
        legal: legal range of a number.
    """
    return field(
        default=default,
        metadata=dict(
            help=help,
            flag=flag,
            off_flag=off_flag,
            aliases=aliases,
            choices=choices,
            shortcuts=shortcuts or {},
            fallbacks=fallbacks,
            metavar=metavar,
            bare=bare,
            legal=legal,
        ),
    )


@dataclass(frozen=True)
class Option:
    """A field that a user can set, as `option` declared it.

    Attributes:
        section: name of the section.
        field: name of the field in the section's dataclass.
        kind: type of one value.
        many: the field is a tuple of such values.
        default: the schema's default.
        flag: the spelling that messages use; for a bool whose default is True, the flag that turns it off.

    The others are the arguments of `option`.
    """

    section: str
    field: str
    kind: type
    many: bool
    default: Any
    help: str
    flag: str
    off_flag: str | None
    aliases: tuple[str, ...]
    choices: tuple[str, ...] | None
    shortcuts: Mapping[str, Any]
    fallbacks: tuple[str, ...]
    metavar: str | None
    bare: str | None
    legal: Range | None

    @property
    def name(self) -> str:
        """Name of the setting, `section.field`, unique in a run."""
        return f"{self.section}.{self.field}"

    def text(self, value: Any) -> str:
        """Return the setting as a user would type it, between backticks: `--num-layers 12`. A value of None is left out."""
        if self.kind is bool or value is None or value == ():
            return f"`{self.flag}`"
        return f"`{self.flag} {' '.join(map(str, value)) if self.many else value}`"


def section_options(section: str, config: type) -> Iterator[Option]:
    """Yield the options of a section, one for each field of its dataclass that has a flag, in order."""
    hints = get_type_hints(config)  # the annotations themselves are strings
    for f in dataclasses.fields(config):
        meta = f.metadata
        if meta["flag"] is None:
            continue
        kind, many = _kind(hints[f.name])
        yield Option(
            section=section,
            field=f.name,
            kind=kind,
            many=many,
            default=f.default,
            help=meta["help"],
            flag=meta["off_flag"] or meta["flag"] or "--" + f.name.replace("_", "-"),
            off_flag=meta["off_flag"],
            aliases=meta["aliases"],
            choices=meta["choices"],
            shortcuts=meta["shortcuts"],
            fallbacks=meta["fallbacks"],
            metavar=meta["metavar"],
            bare=meta["bare"],
            legal=meta["legal"],
        )


def _kind(hint: Any) -> tuple[type, bool]:
    """Return the type of one value, and whether there are several, from a field's annotation."""
    if get_origin(hint) in (Union, types.UnionType):  # of one type and None
        (hint,) = (a for a in get_args(hint) if a is not type(None))
    if get_origin(hint) is tuple:
        return get_args(hint)[0], True
    return hint, False
