"""Phases of a rank's work, as its watchdog records them."""

from __future__ import annotations

from dataclasses import dataclass

Description = object  # the description of a phase: its str(), or the result of calling it

COMPUTING = "computing"  # waits for no other rank; its limit follows from the longest of its kind
DOING = "doing"  # may wait for other ranks; its limit is the job's timeout
ALONE = "alone"  # waits for no other rank; its limit is the job's timeout
WAITING = "waiting"  # waits for other ranks or for the device, without a limit


@dataclass(frozen=True, slots=True)
class Phase:
    """The present work of the main thread.

    Attributes:
        since: start of the phase, `time.monotonic()`.
        mode: COMPUTING, DOING, ALONE or WAITING.
        kind: for COMPUTING, the kind whose durations are compared; otherwise empty.
        what: the description; a function is called only when the description is needed.
    """

    since: float
    mode: str
    kind: str
    what: Description


def describe_phase(what: Description) -> str:
    """Return the description of a phase as text."""
    try:
        return str(what()) if callable(what) else str(what)
    except Exception as error:  # a wrong description must not end a healthy job
        return f"a phase that cannot be described ({error})"
