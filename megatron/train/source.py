"""Where a run's state comes from, as a value."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from megatron.config.schema import RunSettings
from megatron.train.state import TrainState


@dataclass(frozen=True)
class StateSource:
    """directory: the checkpoint, None for a fresh start. saved, state: the configuration and the counters in it.
    optimizer, progress: whether these come from it too, beside the weights. lines: what to tell. verified: every byte of
    it was compared with the manifest."""

    directory: Path | None = None
    saved: RunSettings | None = None
    state: TrainState = field(default_factory=TrainState)
    optimizer: bool = False
    progress: bool = False
    lines: tuple[str, ...] = ()
    verified: bool = False
