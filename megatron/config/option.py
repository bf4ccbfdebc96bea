"""Declare dataclass fields with their flag, their help text and their legal values."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Union, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class Range:
    """Legal range of a number.

    Attributes:
        text: description of the range, which follows "must be" in messages.
        contains: returns whether a number is in the range.
    """

    text: str
    contains: Callable[[Any], bool]


POSITIVE = Range("greater than 0", lambda v: v > 0)
NOT_NEGATIVE = Range("0 or greater", lambda v: v >= 0)
FROM_0_BELOW_1 = Range("at least 0 and less than 1", lambda v: 0 <= v < 1)
BETWEEN_0_AND_1 = Range("greater than 0 and less than 1", lambda v: 0 < v < 1)
FROM_0_TO_1 = Range("from 0 to 1", lambda v: 0 <= v <= 1)
ABOVE_0_TO_1 = Range("greater than 0 and at most 1", lambda v: 0 < v <= 1)
MAX_TOKENS = 1 << 24  # limit for the vocabulary of a file; the largest known vocabularies have about a million tokens
# Schedules and tables have an entry for each layer and micro-batch, so a typing error must not ask for billions of them.
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
        help: text for --help: the meaning of the value and its unit, or the effect of a switch; for an `off_flag`, a noun
            phrase that follows "turns off". It ends with the default if that is derived from other settings: "(default: --lr)".
        flag: spelling of the flag, if it is not the field's name with dashes; None for a field that no flag sets.
        off_flag: flag that turns off a bool whose default is True.
        aliases: other spellings of the same flag.
        choices: the legal strings.
        shortcuts: further flags without a value -> the value to which each sets this field; for example,
            `--use-rotary-position-embeddings` sets `position_embedding_type` to "rope".
        fallbacks: the keys of `shortcuts` that apply only if nothing else sets the field.
        metavar: name of the value in --help; by default N, X or TEXT.
        bare: value of the field if the flag is given without a value; in TOML, the meaning of `true`.
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
        many: the field is a tuple of values of this type.
        default: the schema's default.
        flag: the spelling that messages use; for a bool whose default is True, the flag that turns it off.

    The other attributes are the arguments of `option`.
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
        """Return the setting as a user would type it, between backticks: `--num-layers 12`, or the flag alone for None."""
        if self.kind is bool or value is None or value == ():
            return f"`{self.flag}`"
        return f"`{self.flag} {' '.join(map(str, value)) if self.many else value}`"


def section_options(section: str, config: type) -> Iterator[Option]:
    """Yield an option for each field of a section's dataclass that has a flag, in order."""
    hints = get_type_hints(config)  # `field.type` is a string, because of `from __future__ import annotations`
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
    """Return the type of one value, and whether the field is a tuple of such values, from the field's annotation."""
    if get_origin(hint) in (Union, types.UnionType):  # a union of one type and None
        (hint,) = (a for a in get_args(hint) if a is not type(None))
    if get_origin(hint) is tuple:
        return get_args(hint)[0], True
    return hint, False
