"""Phases of a rank's work, as its watchdog records them."""

from __future__ import annotations

from dataclasses import dataclass

Description = object  # describes a phase by its str(), or if it is a function, by that of its result

# Modes of a phase, which determine its time limit.
COMPUTING = "computing"  # does not wait for other ranks; the limit is a multiple of the longest earlier phase of its kind
SHARED_WORK = "shared work"  # may wait for other ranks; the limit is the job's timeout
LOCAL_WORK = "local work"  # does not wait for other ranks; the limit is the job's timeout
WAITING = "waiting"  # waits for other ranks or for the device, without a limit


@dataclass(frozen=True, slots=True)
class Phase:
    """The current work of the main thread.

    Attributes:
        since: start of the phase, `time.monotonic()`.
        mode: COMPUTING, SHARED_WORK, LOCAL_WORK or WAITING.
        kind: kind of computation, whose durations are compared; empty in other modes.
        what: the description, or a function that returns it. It is called at every change of phase, so it must be cheap.
    """

    since: float
    mode: str
    kind: str
    what: Description


def describe_phase(what: Description) -> str:
    """Return the description of a phase as text."""
    try:
        return str(what()) if callable(what) else str(what)
    except Exception as error:  # an error in the description must not end a healthy job
        return f"a phase that cannot be described ({error})"
