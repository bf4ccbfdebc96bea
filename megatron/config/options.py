"""All options of a run and of its command, collected from the schema."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from megatron.config.command import CommandConfig
from megatron.config.option import Option, section_options
from megatron.config.schema import sections


@cache
def options() -> tuple[Option, ...]:
    """Return the options of the command and of all sections, in the schema's order."""
    tables = {"command": CommandConfig, **sections()}
    return tuple(option for section, config in tables.items() for option in section_options(section, config))


@cache
def by_name() -> Mapping[str, Option]:
    """Return the options by `section.field`."""
    return {o.name: o for o in options()}


def flag_text(name: str, value: Any) -> str:
    """Return a setting as a user would type it, between backticks: `--num-layers 12`, or the flag alone if `value` is None."""
    return by_name()[name].text(value)
