"""Text of a command line, and values of a TOML or JSON file, as the value that a setting holds."""

from __future__ import annotations

import math
from typing import Any

from megatron.config.command_line.other_flags.refused import VALUES
from megatron.config.option import Option

NAMES_OF_FILES = ("checkpoint", "data", "tokenizer")  # sections whose words name files, or what is in them


def convert(option: Option, text: str) -> Any:
    """The value that `text` means. ValueError saying what it is not."""
    if option.kind is int:
        try:
            return int(text)
        except ValueError:
            raise ValueError("is not an integer") from None
    if option.kind is float:
        try:
            number = float(text)
        except ValueError:
            raise ValueError("is not a number") from None
        if not math.isfinite(number):
            raise ValueError("is not a finite number")
        return number
    if option.choices and text not in option.choices:
        elsewhere = VALUES.get(option.flag, {}).get(text)
        raise ValueError(elsewhere or f"is not known; legal: {', '.join(option.choices)}")
    if not text and option.section in NAMES_OF_FILES:
        raise ValueError("is empty")
    return text


def coerce(option: Option, value: Any) -> Any:
    """A TOML or JSON value as the field holds it. ValueError saying what it is not."""
    if option.many:
        items = value if isinstance(value, (list, tuple)) else [value]
        return tuple(_accept_one(option, item) for item in items)
    return _accept_one(option, value)


def _accept_one(option: Option, value: Any) -> Any:
    if option.bare is not None and isinstance(value, bool):
        return option.bare if value else option.default
    if option.kind is bool or isinstance(value, bool):
        if option.kind is bool and isinstance(value, bool):
            return value
        raise ValueError("must be true or false" if option.kind is bool else "cannot be true or false")
    if option.kind is int and not isinstance(value, int):
        raise ValueError("is not an integer")
    if option.kind is float and not isinstance(value, (int, float)):
        raise ValueError("is not a number")
    if option.kind is str and not isinstance(value, (str, int, float) if option.many else str):
        raise ValueError("is not a string")
    return convert(option, str(value))
