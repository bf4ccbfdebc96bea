"""The command itself: settings that are not part of the run, and are not saved."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.config.option import option
from megatron.config.presets import PRESETS


@dataclass(frozen=True)
class CommandConfig:
    """The command itself. These are not part of the run, and are not saved."""

    config: str | None = option(None, "a TOML file with the same settings; flags win over it", metavar="FILE")
    preset: str | None = option(None, "sizes of a known model; file and flags win over it", choices=tuple(PRESETS))
    dry_run: bool = option(False, "check everything and print what would run, in one CPU process; exit 0 or 2")
    world_size: int | None = option(None, "number of ranks that --dry-run assumes; default one")
    help: bool = option(False, "print this and exit", aliases=("-h",))
    version: bool = option(False, "print the version and exit")
