"""Describe where a run's weights and counters come from: a checkpoint, or the seed."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from megatron.config.schema import RunSettings
from megatron.train.state import TrainState


@dataclass(frozen=True)
class StateSource:
    """The source of a run's weights and counters: a checkpoint or the seed.

    Attributes:
        directory: the checkpoint; None for a fresh start.
        saved: the configuration in the checkpoint.
        state: the counters in the checkpoint.
        optimizer: the optimizer's state is loaded from the checkpoint, too.
        progress: the counters, with schedule and data position, are loaded from the checkpoint, too: the run is resumed.
        lines: lines for the user that explain why this source was chosen.
        verified: every byte of the checkpoint has been compared with its manifest.
    """

    directory: Path | None = None
    saved: RunSettings | None = None
    state: TrainState = field(default_factory=TrainState)
    optimizer: bool = False
    progress: bool = False
    lines: tuple[str, ...] = ()
    verified: bool = False
