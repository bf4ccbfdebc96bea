"""Heartbeats of ranks, and the judgement of who died, froze or hangs. Imports no torch.

Each rank writes a `Heartbeat` every half second. From the heartbeats of the others, and the process table of its own host, a
rank sees who died and who is frozen; from its own `DurationTracker` it sees that it hangs itself.
"""

from __future__ import annotations

import json
import os
import signal
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class WatchdogTimeouts:
    """Seconds that a watchdog waits.

    Attributes:
        period: between two heartbeats.
        silent: without a heartbeat, until a rank counts as frozen or lost.
        hang: the least that a computation may take before it counts as hung.
        first: the least for the first computation of its kind, where that takes longer, as a compiler does; default `hang`.
        settle: after a communication error or SIGTERM, until the cause of it must have shown.
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
        space: boot and process namespace; empty where the process cannot be looked up.
        pid: its number.
        started: time at which it started, in clock ticks since boot; a number alone is used again.
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
        """Return a process of this host and namespace by its number."""
        try:
            # Containers may share a host's name but not its process numbers.
            boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
            space = f"{boot} {os.readlink('/proc/self/ns/pid')}"
        except OSError:
            space = ""  # nobody is looked up
        _, started = _stat(pid)
        return cls(os.uname().nodename, space, pid, started)

    def state(self, seen_from: Process) -> str:
        """`gone`, `stopped` or `alive`; `unknown` from another host."""
        if not self.space or self.space != seen_from.space:
            return "unknown"
        state, started = _stat(self.pid)
        if started != self.started or state in "ZX":
            return "gone"
        return "stopped" if state in "Tt" else "alive"

    def kill(self, seen_from: Process) -> None:
        """End it without asking, which also ends a stopped process. Nothing from another host."""
        if self.state(seen_from) in ("stopped", "alive"):
            try:
                os.kill(self.pid, signal.SIGKILL)
            except OSError:
                return  # it went by itself


def _stat(pid: int) -> tuple[str, int]:
    """Letter of the state and start time of a process; `X` and 0 when there is none."""
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
        number: counts up with each heartbeat.
        what: the rank's phase in words.
        age: seconds since the phase began.
        seconds_left: seconds until the phase counts as a hang; None where it has no such limit.
        ending: why no more heartbeats need come: `finished`, `terminated`, `ended`; empty while the rank works.
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
    """Durations of this rank's computations, by kind, and the time that one may take.

    The first of a kind may take `first` seconds; it allocates and connects, or compiles, and says little about the rest.
    From then on the limit is three times the longest one, and at least `hang` seconds; never more than `timeout`.
    """

    def __init__(self, hang: float, timeout: float, first: float | None = None) -> None:
        self._hang, self._timeout, self._allowed = hang, timeout, hang if first is None else first
        self._first: set[str] = set()
        self._longest: dict[str, float] = {}

    def record(self, kind: str, seconds: float) -> None:
        """Record how long a phase of one kind took. The first of its kind does not count once there is another."""
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
        """Return the seconds of the longest phase of a kind; None where none has ended."""
        return self._longest.get(kind)

    def limit(self, kind: str) -> float:
        """Return the seconds after which a phase of a kind counts as hung."""
        longest = self._longest.get(kind)
        return min(self._timeout, self._allowed if longest is None else max(self._hang, 3.0 * longest))


@dataclass
class Peer:
    """Another rank as this one sees it.

    Attributes:
        beat: the last heartbeat that was read of it.
        quiet: seconds since that came, counted by this rank.
    """

    beat: Heartbeat
    quiet: float = 0.0

    def update(self, beat: Heartbeat, seconds: float) -> None:
        """Take in the heartbeat that was read now, `seconds` after the last reading."""
        # By its number and not its time: the clocks of two hosts differ.
        self.quiet = 0.0 if beat.number != self.beat.number else self.quiet + seconds
        self.beat = beat

    def has_ended(self, own: Process) -> bool:
        """Return whether the rank has ended, or is about to and needs nobody any more."""
        return self.beat.ending in ("ended", "finished") or self.beat.process.state(own) == "gone"

    def problem(self, timeouts: WatchdogTimeouts, own: Process, *, trouble: bool) -> str | None:
        """Return what is wrong with the rank, in words; None while nothing is.

        Args:
            timeouts: the limits.
            own: the process that asks.
            trouble: something is known to be wrong somewhere, so a rank that cannot be looked up may be silent for less long.
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
    """Return whether a computation that takes `age` seconds may be held up by another rank.

    Work given to a GPU waits for other ranks without saying so. Then the one whose own work began earlier is to blame, and
    it may be within its limit still: it compiles, or reads data.
    """
    return any(
        not peer.beat.ending
        and peer.beat.seconds_left is not None
        and peer.beat.seconds_left > 0
        and peer.beat.age + peer.quiet > age
        for peer in others
    )
