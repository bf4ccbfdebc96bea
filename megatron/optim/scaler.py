"""The loss scale, by which gradients become numbers that fp16 has (arXiv 1710.03740). Pure.

fp16 ends at 65504 and begins at 6e-8, and gradients are small: the loss is scaled up before the backward pass, and the
gradients are scaled down again in fp32. A constant scale is given; the dynamic one is as large as overflows allow. Its rule
is Megatron-LM's, step by step:

    an update                     after `window` of them in a row the scale doubles, and the patience is whole again
    a skipped step, overflow      the count starts anew and the patience loses one; once it has none left, this and each
                                  further overflow halve the scale

So a single overflow costs no precision, and patience that was lost comes back only when the scale grows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

GROWTH_FACTOR = 2.0
BACKOFF_FACTOR = 0.5


class Scaler(Protocol):
    """A loss scale; equal on all ranks, since all of them see the same steps skipped."""

    @property
    def scale(self) -> float:
        """Factor of the loss of the next step."""
        ...

    def update(self, finite: bool) -> None:
        """Note that a step was made (its gradient was finite), or was skipped."""
        ...

    def scalars(self) -> dict[str, Any]:
        """Return the state that a checkpoint keeps, as JSON values."""
        ...

    def load_scalars(self, values: Mapping[str, Any]) -> None:
        """Take back what `scalars` gave. Where the values are another kind of scaler's, this one stays as it is."""
        ...


@dataclass(frozen=True)
class ConstantScaler:
    """The same scale for ever; 1 where no scale is needed."""

    scale: float = 1.0

    def update(self, finite: bool) -> None:
        """Nothing changes."""

    def scalars(self) -> dict[str, Any]:
        return {}

    def load_scalars(self, values: Mapping[str, Any]) -> None:
        """Nothing is kept."""


@dataclass
class DynamicScaler:
    """The largest power-of-two multiple of the initial scale that does not overflow, found by trying.

    scale: at first the initial one. min_scale: it never falls below. window: updates in a row that double it. hysteresis:
    the overflow that halves it, counted from when it last grew. updates: in a row so far. patience: overflows left.
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
        """The settings stay this run's; where the checkpoint has no dynamic scale, so does the position."""
        if values:
            self.scale, self.updates = float(values["scale"]), int(values["updates"])
            self.patience = int(values["patience"])
