"""Heartbeats of ranks, and the rules by which a rank counts as dead, frozen or hung. Imports no torch.

Each rank writes a `Heartbeat` every half second. From the heartbeats of the others, and the process table of its own host, a
rank detects that another one died or is frozen; from its own `DurationTracker`, that it hangs itself.
"""

from __future__ import annotations

import json
import os
import signal
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class WatchdogTimeouts:
    """Timeouts of a watchdog, in seconds.

    Attributes:
        period: time between two heartbeats.
        silent: time without a heartbeat after which a rank counts as frozen or lost.
        hang: minimum duration after which a computation can count as hung.
        first: the same for the first computation of its kind, which may include compilation; default `hang`.
        settle: time after a communication error or SIGTERM within which its cause must have shown.
    """

    period: float = 0.5
    silent: float = 10.0
    hang: float = 20.0
    first: float | None = None
    settle: float = 3.0


@dataclass(frozen=True)
class Process:
    """A process that can be looked up in the process table of its host.

    Attributes:
        host: name of its host.
        space: boot id and process namespace; empty if the process cannot be looked up.
        pid: process id.
        started: start time in clock ticks since boot, since process ids are reused.
    """

    host: str
    space: str
    pid: int
    started: int

    @classmethod
    def own(cls) -> Process:
        """Return this process."""
        return cls.here(os.getpid())

    @classmethod
    def here(cls, pid: int) -> Process:
        """Return a process of this host and namespace by its process id."""
        try:
            # Containers may share a host's name but not its process ids.
            boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
            space = f"{boot} {os.readlink('/proc/self/ns/pid')}"
        except OSError:
            space = ""  # no process can be looked up
        _, started = _stat(pid)
        return cls(os.uname().nodename, space, pid, started)

    def state(self, seen_from: Process) -> str:
        """Return `gone`, `stopped` or `alive`; `unknown` from another host."""
        if not self.space or self.space != seen_from.space:
            return "unknown"
        state, started = _stat(self.pid)
        if started != self.started or state in "ZX":
            return "gone"
        return "stopped" if state in "Tt" else "alive"

    def kill(self, seen_from: Process) -> None:
        """Send SIGKILL, which also ends a stopped process; does nothing from another host."""
        if self.state(seen_from) in ("stopped", "alive"):
            try:
                os.kill(self.pid, signal.SIGKILL)
            except OSError:
                return  # it has ended by itself


def _stat(pid: int) -> tuple[str, int]:
    """Return state letter and start time of a process from /proc; `X` and 0 when there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "X", 0
    # The name in parentheses may hold anything, also blanks.
    fields = text.rpartition(")")[2].split()
    return fields[0], int(fields[19])


@dataclass(frozen=True)
class Heartbeat:
    """One sign of life of a rank.

    Attributes:
        process: the rank's process.
        number: serial number of the heartbeat.
        what: description of the rank's phase.
        age: seconds since the phase began.
        seconds_left: seconds until the phase counts as hung; None for a phase without a limit.
        ending: the reason why heartbeats may stop: `finished`, `terminated` or `ended`; empty while the rank works.
    """

    process: Process
    number: int = 0
    what: str = ""
    age: float = 0.0
    seconds_left: float | None = None
    ending: str = ""

    def to_bytes(self) -> bytes:
        """Return the heartbeat as JSON, for the store."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Heartbeat:
        """Read a heartbeat that `to_bytes` wrote."""
        fields = json.loads(data)
        return cls(**fields | {"process": Process(**fields["process"])})


class DurationTracker:
    """Records the durations of this rank's computations by kind, and derives the time limit of the next one.

    The first of a kind may take `first` seconds, since it allocates, connects or compiles. After that the limit is three times
    the longest duration so far, at least `hang` seconds, and at most `timeout`.
    """

    def __init__(self, hang: float, timeout: float, first: float | None = None) -> None:
        self._hang, self._timeout, self._allowed = hang, timeout, hang if first is None else first
        self._first: set[str] = set()
        self._longest: dict[str, float] = {}

    def record(self, kind: str, seconds: float) -> None:
        """Record the duration of a phase of one kind. The second one replaces the first, which is slower than the rest."""
        longest = self._longest.get(kind)
        if longest is None:
            self._longest[kind] = seconds
            self._first.add(kind)
        elif kind in self._first:
            self._longest[kind] = seconds
            self._first.discard(kind)
        elif seconds > longest:
            self._longest[kind] = seconds

    def longest(self, kind: str) -> float | None:
        """Return the duration of the longest phase of a kind in seconds; None before one has ended."""
        return self._longest.get(kind)

    def limit(self, kind: str) -> float:
        """Return the seconds after which a phase of a kind counts as hung."""
        longest = self._longest.get(kind)
        return min(self._timeout, self._allowed if longest is None else max(self._hang, 3.0 * longest))


@dataclass
class Peer:
    """Another rank as seen by this one.

    Attributes:
        beat: its last heartbeat.
        quiet: seconds since that heartbeat arrived, counted by this rank.
    """

    beat: Heartbeat
    quiet: float = 0.0

    def update(self, beat: Heartbeat, seconds: float) -> None:
        """Record the heartbeat that was just read, `seconds` after the last reading."""
        # Recognized as new by its number, not by a time, since the clocks of two hosts differ.
        self.quiet = 0.0 if beat.number != self.beat.number else self.quiet + seconds
        self.beat = beat

    def has_ended(self, own: Process) -> bool:
        """Return whether the rank has ended, or is about to end and needs no other rank."""
        return self.beat.ending in ("ended", "finished") or self.beat.process.state(own) == "gone"

    def problem(self, timeouts: WatchdogTimeouts, own: Process, *, trouble: bool) -> str | None:
        """Return a description of the rank's failure; None while it seems healthy.

        Args:
            timeouts: the limits.
            own: this process.
            trouble: some failure in the job is known, so a shorter silence counts for a process that cannot be looked up.
        """
        if self.beat.ending:
            return None
        state = self.beat.process.state(own)
        if state == "gone":
            return f"its process died without a word (killed, out of memory, or crashed); last heard {self.quiet:.1f} s before"
        limit = timeouts.silent
        if trouble and state != "alive":
            limit = min(limit, timeouts.settle * 2 / 3)
        if self.quiet < limit:
            return None
        why = {
            "stopped": "its process is stopped (SIGSTOP)",
            "alive": "its process is there but frozen",
            "unknown": "its process died or froze, or its host is lost",
        }[state]
        return f"no sign of life for {self.quiet:.0f} s: {why}"


def may_wait_for_peer(age: float, others: list[Peer]) -> bool:
    """Return whether a computation that has taken `age` seconds may be waiting for another rank.

    Work on a GPU can wait for other ranks unnoticed. Then the rank whose phase began earlier is the cause, and it may still be
    within its own limit, because it compiles or reads data.
    """
    return any(
        not peer.beat.ending
        and peer.beat.seconds_left is not None
        and peer.beat.seconds_left > 0
        and peer.beat.age + peer.quiet > age
        for peer in others
    )
