"""What a rank does at one time, as it tells its watch."""

from __future__ import annotations

from dataclasses import dataclass

Description = object  # a phase in words, by its str() or, where it can be called, by its result

COMPUTING = "computing"  # waits for nobody, and is judged by the longest of its kind
DOING = "doing"  # may wait for others, and may take as long as the job's timeout
ALONE = "alone"  # the same without waiting
WAITING = "waiting"  # for others or for the device, as long as it takes


@dataclass(frozen=True, slots=True)
class Phase:
    """What the main thread is at.

    since: when it began, of `time.monotonic`. mode: COMPUTING, DOING, ALONE or WAITING. kind: of a computation, by which its
    usual duration is known; else empty. what: in words, which are made only when somebody reads them.
    """

    since: float
    mode: str
    kind: str
    what: Description


def describe_phase(what: Description) -> str:
    """Describe a phase as its rank does."""
    try:
        return str(what()) if callable(what) else str(what)
    except Exception as error:  # a wrong description must not end a healthy job
        return f"a phase that cannot be described ({error})"
