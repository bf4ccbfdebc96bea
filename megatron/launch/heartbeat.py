"""Heartbeats of ranks, and the rules by which a rank counts as dead, frozen or hung. Imports no torch.

Each rank writes a `Heartbeat` every half second. Other ranks detect that it died or is frozen by the heartbeats that they read,
and on the same host by the process table. It detects by its own `DurationTracker` that it hangs.
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
        first: `hang` for the first computation of each kind, which may include compilation; default `hang`.
        settle: time that a rank waits, after a communication error or SIGTERM, for the failure that caused it to show.
    """

    period: float = 0.5
    silent: float = 10.0
    hang: float = 20.0
    first: float | None = None
    settle: float = 3.0


@dataclass(frozen=True)
class Process:
    """A process, identified so that others on its host can find it in the process table.

    Attributes:
        host: name of its host.
        space: boot id and process namespace; empty if the host does not report them, so that nobody can find the process.
        pid: process id.
        started: start time in clock ticks since boot; it distinguishes processes with a reused id.
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
        """Return the process with this id in the host and namespace of the caller."""
        try:
            # Containers may share a host's name but not its process ids.
            boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
            space = f"{boot} {os.readlink('/proc/self/ns/pid')}"
        except OSError:
            space = ""  # /proc is missing, so no process can be found
        _, started = _stat(pid)
        return cls(os.uname().nodename, space, pid, started)

    def state(self, seen_from: Process) -> str:
        """Return `gone`, `stopped` or `alive`; `unknown` if `seen_from`, the asking process, is on another host."""
        if not self.space or self.space != seen_from.space:
            return "unknown"
        state, started = _stat(self.pid)
        if started != self.started or state in "ZX":
            return "gone"
        return "stopped" if state in "Tt" else "alive"

    def kill(self, seen_from: Process) -> None:
        """Send SIGKILL, which also ends a stopped process; do nothing if `seen_from` is on another host."""
        if self.state(seen_from) in ("stopped", "alive"):
            try:
                os.kill(self.pid, signal.SIGKILL)
            except OSError:
                return  # it has just ended by itself


def _stat(pid: int) -> tuple[str, int]:
    """Return state letter and start time of a process from /proc; `X` and 0 if it does not exist."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "X", 0
    # The program's name, in parentheses, may contain anything, even blanks and parentheses.
    fields = text.rpartition(")")[2].split()
    return fields[0], int(fields[19])


@dataclass(frozen=True)
class Heartbeat:
    """One heartbeat of a rank.

    Attributes:
        process: process of the rank.
        number: serial number of the heartbeat.
        what: description of the rank's phase.
        age: seconds since the phase began.
        seconds_left: seconds until the phase counts as hung; None for a phase without a limit.
        ending: why heartbeats will stop: `finished` (its work), `terminated` (by a signal) or `ended` (after a failure); empty
            while the rank works.
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

    The first of a kind may take `first` seconds, since it allocates, connects or compiles. Later ones may take three times the
    longest duration so far, but at least `hang` and at most `timeout` seconds.
    """

    def __init__(self, hang: float, timeout: float, first: float | None = None) -> None:
        self._hang, self._timeout, self._first_limit = hang, timeout, hang if first is None else first
        self._kinds_seen_once: set[str] = set()
        self._longest: dict[str, float] = {}

    def record(self, kind: str, seconds: float) -> None:
        """Record the duration of a computation. The second of a kind replaces the first, which is slower than all others."""
        longest = self._longest.get(kind)
        if longest is None:
            self._longest[kind] = seconds
            self._kinds_seen_once.add(kind)
        elif kind in self._kinds_seen_once:
            self._longest[kind] = seconds
            self._kinds_seen_once.discard(kind)
        elif seconds > longest:
            self._longest[kind] = seconds

    def longest(self, kind: str) -> float | None:
        """Return the longest duration of a kind so far, in seconds; None before one has ended."""
        return self._longest.get(kind)

    def limit(self, kind: str) -> float:
        """Return the seconds after which a computation of a kind counts as hung."""
        longest = self._longest.get(kind)
        return min(self._timeout, self._first_limit if longest is None else max(self._hang, 3.0 * longest))


@dataclass
class Peer:
    """Another rank as seen by this one.

    Attributes:
        beat: its last heartbeat.
        quiet: seconds since this rank first read that heartbeat.
    """

    beat: Heartbeat
    quiet: float = 0.0

    def update(self, beat: Heartbeat, seconds: float) -> None:
        """Record the heartbeat that was just read, `seconds` after the previous reading."""
        # The number shows whether it is new; a time could not, since the clocks of two hosts differ.
        self.quiet = 0.0 if beat.number != self.beat.number else self.quiet + seconds
        self.beat = beat

    def has_ended(self, own: Process) -> bool:
        """Return whether the rank has ended, or is about to end and needs no other rank."""
        return self.beat.ending in ("ended", "finished") or self.beat.process.state(own) == "gone"

    def problem(self, timeouts: WatchdogTimeouts, own: Process, *, failure_suspected: bool) -> str | None:
        """Return a description of the rank's failure; None while it seems healthy.

        Args:
            timeouts: the limits.
            own: this process.
            failure_suspected: something in the job seems to have failed, so unless the rank's process is known to be alive, a
                shorter silence counts as its failure.
        """
        if self.beat.ending:
            return None
        state = self.beat.process.state(own)
        if state == "gone":
            silence = f"{self.quiet:.1f} s after its last heartbeat"
            return f"its process died without a message (killed, out of memory, or crashed), {silence}"
        limit = timeouts.silent
        if failure_suspected and state != "alive":
            limit = min(limit, timeouts.settle * 2 / 3)
        if self.quiet < limit:
            return None
        why = {
            "stopped": "its process is stopped (SIGSTOP)",
            "alive": "its process is running but frozen",
            "unknown": "its process died or froze, or its host is unreachable",
        }[state]
        return f"no heartbeat for {self.quiet:.0f} s: {why}"


def may_wait_for_peer(age: float, others: list[Peer]) -> bool:
    """Return whether a computation that has taken `age` seconds may be waiting for another rank.

    A kernel on the GPU can wait for another rank while the host seems to compute. The cause is then a rank whose phase began
    earlier, and that may still be within its limit, for example while it compiles or reads data.
    """
    return any(
        not peer.beat.ending
        and peer.beat.seconds_left is not None
        and peer.beat.seconds_left > 0
        and peer.beat.age + peer.quiet > age
        for peer in others
    )
