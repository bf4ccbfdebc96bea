"""Times the actions of a step, where the step runs: wall clock on a CPU, events on a GPU's stream."""

from __future__ import annotations

import time
from typing import Any

import torch

from megatron.pipeline.schedules.schedule import Action


class Recorder:
    """Recorder of a step that is not profiled: it notes nothing."""

    def mark(self) -> Any:
        """Return this moment, for `record`."""
        return None

    def record(self, action: Action, begun: Any) -> None:
        """Note that `action` ran from `begun` until now."""


class Stopwatch(Recorder):
    """Recorder of the start and end of every action; waiting for what an action needs is no part of it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self._spans: dict[Action, tuple[Any, Any]] = {}
        self._zero, self._time = self.mark(), time.time()

    def mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        # On the stream, so that it marks when the GPU gets here, not when this process does.
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def record(self, action: Action, begun: Any) -> None:
        self._spans[action] = begun, self.mark()

    def spans(self) -> dict[Action, tuple[float, float]]:
        """Return (start, end) of every action, in seconds of the host's clock, which processes of a host share."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return {action: (self._clock(start), self._clock(end)) for action, (start, end) in self._spans.items()}

    def _clock(self, moment: Any) -> float:
        if self.device.type == "cuda":
            # elapsed_time is in milliseconds.
            return self._time + float(self._zero.elapsed_time(moment)) / 1000.0
        return self._time + float(moment - self._zero)
