"""Recorders of the times of a step's actions: by the host's clock on a CPU, by events on the stream on a GPU."""

from __future__ import annotations

import time
from typing import Any

import torch

from megatron.pipeline.schedules.schedule import Action


class Recorder:
    """Recorder for steps that are not profiled; it records nothing."""

    def mark(self) -> Any:
        """Return the current time, in a form that `record` accepts."""
        return None

    def record(self, action: Action, begun: Any) -> None:
        """Record that `action` ran from `begun` until now."""


class Stopwatch(Recorder):
    """Recorder of the start and end of every action, without the wait for its input."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self._spans: dict[Action, tuple[Any, Any]] = {}
        self._zero, self._time = self.mark(), time.time()

    def mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        # An event is timed when the GPU's stream reaches it, not when this process records it.
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def record(self, action: Action, begun: Any) -> None:
        self._spans[action] = begun, self.mark()

    def spans(self) -> dict[Action, tuple[float, float]]:
        """Return (start, end) of every action in seconds since the epoch, comparable between processes of a host."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return {action: (self._host_time(start), self._host_time(end)) for action, (start, end) in self._spans.items()}

    def _host_time(self, moment: Any) -> float:
        if self.device.type == "cuda":
            # elapsed_time is in milliseconds.
            return self._time + float(self._zero.elapsed_time(moment)) / 1000.0
        return self._time + float(moment - self._zero)
