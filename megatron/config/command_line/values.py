"""Convert words of a command line, and values of a TOML or JSON file, to the type of their setting."""

from __future__ import annotations

import math
from typing import Any

from megatron.config.command_line.other_flags.refused import VALUES
from megatron.config.option import Option

FILE_SECTIONS = ("checkpoint", "data", "tokenizer")  # sections in which a string names files, and an empty one is a mistake


def parse_value(option: Option, text: str) -> Any:
    """Convert a word to the value of a setting. ValueError, for a message after the flag, when it is none."""
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
        if not math.isfinite(number):  # float() accepts "nan" and "inf"
            raise ValueError("is not a finite number")
        return number
    if option.choices and text not in option.choices:
        elsewhere = VALUES.get(option.flag, {}).get(text)
        raise ValueError(elsewhere or f"is not known; legal: {', '.join(option.choices)}")
    if not text and option.section in FILE_SECTIONS:
        raise ValueError("is empty")
    return text


def coerce(option: Option, value: Any) -> Any:
    """Convert a TOML or JSON value to the value of a setting. ValueError when it has the wrong type."""
    if option.many:
        items = value if isinstance(value, (list, tuple)) else [value]
        return tuple(_accept_one(option, item) for item in items)
    return _accept_one(option, value)


def _accept_one(option: Option, value: Any) -> Any:
    if option.bare is not None and isinstance(value, bool):
        return option.bare if value else option.default
    if option.kind is bool or isinstance(value, bool):  # before numbers: Python's True is an int
        if option.kind is bool and isinstance(value, bool):
            return value
        raise ValueError("must be true or false" if option.kind is bool else "cannot be true or false")
    if option.kind is int and not isinstance(value, int):
        raise ValueError("is not an integer")
    if option.kind is float and not isinstance(value, (int, float)):
        raise ValueError("is not a number")
    # In a list of words numbers are words too, as in `data-path = [0.3, "first", 0.7, "second"]`.
    if option.kind is str and not isinstance(value, (str, int, float) if option.many else str):
        raise ValueError("is not a string")
    return parse_value(option, str(value))
