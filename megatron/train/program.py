"""What an entry script does: from a command line to an exit status.

A command is read, checked and explained before torch is even imported, so a mistake is answered at once.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron.config.cli import HelpAsked, explain, parse
from megatron.config.errors import ConfigError, Problem
from megatron.config.schema import CheckpointConfig
from megatron.dryrun import dry_run
from megatron.mesh.place import Place


def pretrain(argv: Sequence[str], *, program: str, defaults: Mapping[str, Any]) -> int:
    """Run a pretraining command; returns the exit status of the contract: 0, 1, 2 or 75.

    defaults: the program's own, `section.field` -> value. SystemExit with status 2 for a wrong configuration.
    """
    began = time.monotonic()
    try:
        place = Place.of(os.environ)
    except ValueError as error:
        explain(ConfigError([Problem("the launcher's environment", f"cannot be read: {error}")]), program)
    first = place.rank == 0
    try:
        parsed = parse(argv, program=program, defaults=defaults, world_size=place.world_size, saved=_saved_config)
    except HelpAsked as answer:
        if first:
            sys.stdout.write(str(answer))
        return 0
    except ConfigError as error:
        explain(error, program, place.rank)
    if parsed.dry_run:
        return dry_run(parsed, program) if first else 0
    from megatron.train.pretraining import start

    return start(parsed, place, program, began)


def _saved_config(checkpoint: CheckpointConfig) -> Mapping[str, Any]:
    """The configuration saved with the checkpoint to load, for --use-checkpoint-args."""
    from megatron.checkpoint.layout import CheckpointError, find, read_config

    try:
        return read_config(find(Path(checkpoint.load or checkpoint.save or "."), checkpoint.load_iteration))
    except CheckpointError as error:
        raise ConfigError([Problem("`--use-checkpoint-args`", f"finds no configuration: {error}")]) from error
