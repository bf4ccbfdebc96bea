"""One setting: a dataclass field that knows its flag, its help and its legal values."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Union, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class Range:
    """`text` says in words what `holds` tests."""

    text: str
    holds: Callable[[Any], bool]


POSITIVE = Range("greater than 0", lambda v: v > 0)
NOT_NEGATIVE = Range("0 or greater", lambda v: v >= 0)
FROM_0_BELOW_1 = Range("at least 0 and less than 1", lambda v: 0 <= v < 1)
BETWEEN_0_AND_1 = Range("greater than 0 and less than 1", lambda v: 0 < v < 1)
FROM_0_TO_1 = Range("from 0 to 1", lambda v: 0 <= v <= 1)
ABOVE_0_TO_1 = Range("greater than 0 and at most 1", lambda v: 0 < v <= 1)
MAX_TOKENS = 1 << 24  # ids of a stranger's tokenizer, and new rows of a vocabulary; the largest known ones have a million
# What is listed one by one, layer by layer and micro-batch by micro-batch.
LAYERS = Range("greater than 0 and at most 65,536", lambda v: 0 < v <= 1 << 16)
SAMPLES = Range("greater than 0 and at most 1,048,576", lambda v: 0 < v <= 1 << 20)


def option(
    default: Any,
    help: str,
    *,
    flag: str | None = "",
    off: str | None = None,
    aliases: tuple[str, ...] = (),
    choices: tuple[str, ...] | None = None,
    nargs: str | None = None,
    values: Mapping[str, Any] | None = None,
    yielding: tuple[str, ...] = (),
    metavar: str | None = None,
    bare: str | None = None,
    legal: Range | None = None,
) -> Any:
    """A dataclass field that knows its flag.

    flag: the spelling, where it is not the field's name with dashes; None for a field that no flag sets.
    off: for a bool that is on by default, the flag that turns it off.
    aliases: other spellings of the same flag. values: further flags that take no argument and set this field to a
    value (`--use-rotary-position-embeddings` sets `position_embedding_type` to "rope").
    yielding: those of `values` that hold only where nothing else sets the field to something of its own.
    choices: the legal strings. nargs: argparse's, for a field that takes several values.
    bare: for a flag whose value may be left out, what the flag alone sets; in TOML, what `true` sets.
    legal: the range of a number.
    """
    return field(
        default=default,
        metadata=dict(
            help=help,
            flag=flag,
            off=off,
            aliases=aliases,
            choices=choices,
            nargs=nargs,
            values=values or {},
            yielding=yielding,
            metavar=metavar,
            bare=bare,
            legal=legal,
        ),
    )


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
    legal: Range | None

    @property
    def name(self) -> str:
        """`section.field`, unique over a run."""
        return f"{self.section}.{self.field}"

    def text(self, value: Any) -> str:
        """Return the setting as a user would type it, between backticks: `--num-layers 12`; an open value is left out."""
        if self.kind is bool or value is None or value == ():
            return f"`{self.flag}`"
        return f"`{self.flag} {' '.join(map(str, value)) if self.many else value}`"


def section_options(section: str, config: type) -> Iterator[Option]:
    """Yield the options of a section, one for each field of its dataclass that has a flag, in order."""
    hints = get_type_hints(config)
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
            flag=meta["off"] or meta["flag"] or "--" + f.name.replace("_", "-"),
            off=meta["off"],
            aliases=meta["aliases"],
            choices=meta["choices"],
            constants=meta["values"],
            yielding=meta["yielding"],
            metavar=meta["metavar"],
            bare=meta["bare"],
            legal=meta["legal"],
        )


def _kind(hint: Any) -> tuple[type, bool]:
    """(type of one value, whether there are several) of a field's annotation."""
    if get_origin(hint) in (Union, types.UnionType):
        (hint,) = (a for a in get_args(hint) if a is not type(None))
    if get_origin(hint) is tuple:
        return get_args(hint)[0], True
    return hint, False
