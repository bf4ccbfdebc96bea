"""The loss scale, which moves gradients into the range of fp16 (arXiv 1710.03740).

fp16 represents magnitudes from 6e-8 to 65504, and gradients can be smaller: the loss is scaled up before the backward pass, and
the gradients are scaled down again in fp32. The scale is constant, or dynamic by Megatron-LM's rule:

    an update                     after `window` updates in a row the scale doubles, and `patience` is reset to `hysteresis`
    a step skipped for overflow   the count of updates restarts at 0 and `patience` decreases by one; at 0, this overflow and
                                  each further one halve the scale

With a hysteresis above 1 a single overflow therefore does not lower the scale, and `patience` recovers only when it grows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

GROWTH_FACTOR = 2.0
BACKOFF_FACTOR = 0.5


class Scaler(Protocol):
    """A loss scale. It is equal on all ranks, because all of them skip the same steps."""

    @property
    def scale(self) -> float:
        """Factor by which the loss of the next step is multiplied."""
        ...

    def update(self, finite: bool) -> None:
        """Record whether a step's gradient was finite, and the weights updated, or the step was skipped."""
        ...

    def scalars(self) -> dict[str, Any]:
        """Return the state to be saved in a checkpoint, as JSON values."""
        ...

    def load_scalars(self, values: Mapping[str, Any]) -> None:
        """Restore the state that `scalars` returned. Values saved by the other kind of scaler change nothing."""
        ...


@dataclass(frozen=True)
class ConstantScaler:
    """A scale that never changes; 1 if the loss needs no scaling."""

    scale: float = 1.0

    def update(self, finite: bool) -> None:
        """Do nothing."""

    def scalars(self) -> dict[str, Any]:
        return {}

    def load_scalars(self, values: Mapping[str, Any]) -> None:
        """Do nothing: a constant scale has no state."""


@dataclass
class DynamicScaler:
    """A scale that grows by powers of two until gradients overflow, and then shrinks.

    scale: the current scale. min_scale: its lower bound. window: consecutive updates after which it doubles. hysteresis: value
    that `patience` is reset to when it doubles. updates: consecutive updates so far. patience: overflows until it is halved.
    """

    scale: float
    min_scale: float
    window: float
    hysteresis: int
    updates: int = field(default=0, init=False)
    patience: int = field(init=False)

    def __post_init__(self) -> None:
        self.patience = self.hysteresis

    def update(self, finite: bool) -> None:
        if not finite:
            self.updates = 0
            self.patience -= 1  # Megatron-LM's hysteresis: one overflow may be chance
            if self.patience <= 0:
                self.scale = max(self.scale * BACKOFF_FACTOR, self.min_scale)
            return
        self.updates += 1
        if self.updates >= self.window:
            self.updates, self.patience = 0, self.hysteresis
            self.scale *= GROWTH_FACTOR

    def scalars(self) -> dict[str, Any]:
        return {"scale": self.scale, "updates": self.updates, "patience": self.patience}

    def load_scalars(self, values: Mapping[str, Any]) -> None:
        """Restore the state, but not the settings. values: empty if the checkpoint was saved with a constant scale."""
        if values:
            self.scale, self.updates = float(values["scale"]), int(values["updates"])
            self.patience = int(values["patience"])
