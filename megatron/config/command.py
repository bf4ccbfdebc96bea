"""Flags that concern the command, not the run: help, dry run, and sources of settings."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.config.option import option
from megatron.config.presets import PRESETS


@dataclass(frozen=True)
class CommandConfig:
    """Settings of the command itself, which are not part of the run and are not saved."""

    config: str | None = option(None, "TOML file of settings; flags on the command line win over it", metavar="FILE")
    preset: str | None = option(
        None, "sizes of a published model; the file and the flags win over them", choices=tuple(PRESETS)
    )
    dry_run: bool = option(False, "check the configuration and print what would run, in one CPU process; exit status 0 or 2")
    world_size: int | None = option(None, "number of ranks that --dry-run assumes (default: 1)")
    help: bool = option(False, "print this help and exit", aliases=("-h",))
    version: bool = option(False, "print the version and exit")
