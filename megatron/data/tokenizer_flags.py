"""Add the tokenizer's flags, which are made from `TokenizerConfig`, to the parsers of tools."""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import Any

from megatron.config.schema import TokenizerConfig


def add_tokenizer_flags(parser: argparse.ArgumentParser) -> None:
    """Add one flag per field of TokenizerConfig, with its help and choices."""
    group = parser.add_argument_group("tokenizer")
    for field in fields(TokenizerConfig):
        options: dict[str, Any] = dict(default=field.default, help=field.metadata["help"], choices=field.metadata["choices"])
        if "int" in str(field.type):
            options["type"] = int
        group.add_argument(f"--{field.name.replace('_', '-')}", **options)


def tokenizer_config(args: argparse.Namespace) -> TokenizerConfig:
    """Return the tokenizer settings in parsed arguments."""
    return TokenizerConfig(**{field.name: getattr(args, field.name) for field in fields(TokenizerConfig)})
