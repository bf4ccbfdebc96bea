"""The checkpoint, or the fresh start, that a run's state comes from."""

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
        saved: the configuration in it.
        state: the counters in it.
        optimizer: the optimizer's state comes from it too.
        progress: schedule and data position come from it too.
        lines: what to tell the user of the choice.
        verified: every byte of it was compared with the manifest.
    """

    directory: Path | None = None
    saved: RunSettings | None = None
    state: TrainState = field(default_factory=TrainState)
    optimizer: bool = False
    progress: bool = False
    lines: tuple[str, ...] = ()
    verified: bool = False
