"""Convert the words of a command line, and the values of a TOML or JSON file, to the types of their settings."""

from __future__ import annotations

import math
from typing import Any

from megatron.config.command_line.other_flags.refused import REFUSED_VALUES
from megatron.config.option import Option

FILE_SECTIONS = ("checkpoint", "data", "tokenizer")  # their strings are mostly paths, so an empty string is a mistake


def parse_value(option: Option, text: str) -> Any:
    """Convert a word of the command line to the value of a setting.

    Raises:
        ValueError: the word is not a legal value; the text continues a message that begins with the flag and the word.
    """
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
        reason = REFUSED_VALUES.get(option.flag, {}).get(text)  # for a value that Megatron-LM's flag of this name accepts
        raise ValueError(reason or f"is not known; legal: {', '.join(option.choices)}")
    if not text and option.section in FILE_SECTIONS:
        raise ValueError("is empty")
    return text


def coerce(option: Option, value: Any) -> Any:
    """Convert a TOML or JSON value to the value of a setting. ValueError if it has the wrong type or is not legal."""
    if option.many:
        items = value if isinstance(value, (list, tuple)) else [value]
        return tuple(_coerce_one(option, item) for item in items)
    return _coerce_one(option, value)


def _coerce_one(option: Option, value: Any) -> Any:
    """Convert a value that is not a list."""
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
    # A list of strings may contain numbers without quotes, as in `data-path = [0.3, "first", 0.7, "second"]`.
    if option.kind is str and not isinstance(value, (str, int, float) if option.many else str):
        raise ValueError("is not a string")
    return parse_value(option, str(value))
