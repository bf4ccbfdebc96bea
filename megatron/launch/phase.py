"""Phases of a rank, as it tells its watchdog."""

from __future__ import annotations

from dataclasses import dataclass

Description = object  # a phase in words, by its str() or, where it can be called, by its result

COMPUTING = "computing"  # waits for nobody, and is judged by the longest of its kind
DOING = "doing"  # may wait for others, and may take as long as the job's timeout
ALONE = "alone"  # the same without waiting
WAITING = "waiting"  # for others or for the device, as long as it takes


@dataclass(frozen=True, slots=True)
class Phase:
    """The work of the main thread at one time.

    Attributes:
        since: when it began, of `time.monotonic`, in seconds.
        mode: COMPUTING, DOING, ALONE or WAITING.
        kind: of a computation, by which its usual duration is known; else empty.
        what: the phase in words, which are made only when somebody reads them.
    """

    since: float
    mode: str
    kind: str
    what: Description


def describe_phase(what: Description) -> str:
    """Return the words in which a rank describes its phase."""
    try:
        return str(what()) if callable(what) else str(what)
    except Exception as error:  # a wrong description must not end a healthy job
        return f"a phase that cannot be described ({error})"
