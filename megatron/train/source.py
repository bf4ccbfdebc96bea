"""Source of a run's weights and counters: a checkpoint or a fresh start."""

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
        optimizer: the optimizer's state is loaded from it, too.
        progress: the counters, with schedule and data position, are loaded from it, too.
        lines: lines for the user that explain the choice.
        verified: every byte of the checkpoint was compared with the manifest.
    """

    directory: Path | None = None
    saved: RunSettings | None = None
    state: TrainState = field(default_factory=TrainState)
    optimizer: bool = False
    progress: bool = False
    lines: tuple[str, ...] = ()
    verified: bool = False
