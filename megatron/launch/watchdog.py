"""End a job of several ranks when one of them dies or hangs, with one error message that names its rank, host and phase.

Every rank has a watchdog thread with its own connection to the job's store. Every half second it writes a heartbeat, reads
those of its neighbours, and looks for a published failure. Only the first failure is published and printed, by the rank that
had it. The thread ends the process even while the main thread is blocked inside a collective.

An error in a rank's own work is published at once. A communication error, or a launcher's SIGTERM, is mostly a consequence, so
the rank first looks for one that died, froze or failed. A SIGTERM without such a cause is a request to stop: a training loop
stops at its next step boundary, and in any other phase the watchdog ends the job.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import NoReturn

from megatron.launch.environment import LaunchEnvironment
from megatron.launch.errors import Early, Explain, JobError
from megatron.launch.exit_report import exit_status, is_secondary_error, run_briefly, write_error_file, write_stderr
from megatron.launch.heartbeat import DurationTracker, Heartbeat, Peer, Process, WatchdogTimeouts, may_wait_for_peer
from megatron.launch.phase import ALONE, COMPUTING, DOING, WAITING, Description, Phase, describe_phase
from megatron.launch.signals import StopSignals
from megatron.launch.status_file import StatusFile, read_status, remove_status
from megatron.launch.store import Store, serves_store

STOPPED, REFUSED = 75, 2  # exit statuses of a whole job: stopped on request, or wrong configuration
NEIGHBOURS = 8  # ranks that each rank observes; if it observed all, the store's load would grow with their square
COMMUNICATION = ("torch.distributed", "megatron.parallel.collectives", "megatron.pipeline.transfer")


class Watchdog:
    """Receives the phases of a rank's work. This base class, for a single process, ignores them.

    `what` is the description of the phase, or a function that returns it and is called only if the description is needed.
    """

    at_end: Callable[[], object] | None = None  # called when the watchdog ends the process, if all other ranks have ended

    def computing(self, kind: str, what: Description) -> None:
        """Begin work that waits for no other rank. It counts as hung if it takes far longer than others of its kind."""

    def doing(self, what: Description, *, alone: bool = False) -> None:
        """Begin work that may take as long as the job's timeout. alone: it does not wait for other ranks."""

    def waiting(self, what: Description) -> None:
        """Begin to wait for other ranks or for the device, without a time limit."""

    def idle(self) -> None:
        """End the phase before the next one has begun."""


class JobWatchdog(Watchdog):
    """The watchdog of one rank of several: `start`, then the phases, then `stop` or `fail`.

    Args:
        store: a connection that only this watchdog uses; keeps_store: this process serves it.
        timeout: the job's timeout.
        early: message and status for a signal before `signals.hold()`; by default the process ends as by the signal.
    """

    def __init__(
        self,
        store: Store,
        env: LaunchEnvironment,
        timeout: timedelta,
        *,
        keeps_store: bool = False,
        timeouts: WatchdogTimeouts | None = None,
        explain: Explain = lambda error, where: None,
        signals: StopSignals | None = None,
        early: Early | None = None,
    ) -> None:
        self._store, self._env, self._explain, self._keeps_store = store, env, explain, keeps_store
        self._timeouts, self._timeout = timeouts or WatchdogTimeouts(), timeout.total_seconds()
        self._process, self._pace = Process.own(), DurationTracker(self._timeouts.hang, self._timeout, self._timeouts.first)
        self._status_file = StatusFile(self._process)
        self._phase = self._seen_phase = Phase(time.monotonic(), WAITING, "", "starting up")
        self._age = 0.0  # seconds since the thread first saw this phase
        self._peers: dict[int, Peer] = {}
        others = [(env.rank + i) % env.world_size for i in range(1, env.world_size)]
        self._others, self._neighbours = others, others[:NEIGHBOURS]
        self._beat_number, self._pending_beat, self._ending, self._published_ending = 0, 0, "", ""
        self._error: BaseException | None = None
        self._signals, self._early = signals or StopSignals(), early
        self._signal_age = self._error_age = 0.0  # seconds since the signal, and since the error
        self._stopping, self._over = threading.Event(), threading.Event()
        self._main = threading.get_ident()
        self._last_round = time.monotonic()
        self._threads: list[threading.Thread] = []

    # The main thread calls these, at some microseconds each.

    def computing(self, kind: str, what: Description) -> None:
        """Begin a phase whose limit follows from earlier ones of its kind."""
        self._change(COMPUTING, kind, what)

    def doing(self, what: Description, *, alone: bool = False) -> None:
        """Begin a phase whose limit is the job's timeout."""
        self._change(ALONE if alone else DOING, "", what)

    def waiting(self, what: Description) -> None:
        """Begin a phase without a time limit."""
        self._change(WAITING, "", what)

    def idle(self) -> None:
        """Begin an unnamed phase without a time limit."""
        self._change(WAITING, "", "between two phases")

    def _change(self, mode: str, kind: str, what: Description) -> None:
        """Begin a phase; the duration of a computation that ends is recorded."""
        now, ended = time.monotonic(), self._phase
        if ended.mode == COMPUTING:
            self._pace.record(ended.kind, now - ended.since)
        self._phase = Phase(now, mode, kind, what)
        self._status_file.write(describe_phase(what))

    def start(self) -> None:
        """Start the watchdog's threads."""
        self._wake, self._waker = os.pipe()
        os.set_blocking(self._wake, False)
        os.set_blocking(self._waker, False)
        self._store.compare_set("failure", "", "-")
        self._threads = [threading.Thread(target=t, name="watch", daemon=True) for t in (self._watch, self._watch_store)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End the threads, since the rank's work is done. The rank that serves the store first waits for all others."""
        self._change(WAITING, "", "waiting for the other ranks to finish")
        self._stopping.set()
        self._wake_thread()
        for thread in self._threads:
            thread.join()
        self._status_file.wipe()
        os.close(self._wake)
        os.close(self._waker)

    def fail(self, error: BaseException) -> NoReturn:
        """End the process after an error in the rank's work; the thread finds the cause, and one rank reports it."""
        self._seen_phase = self._phase  # the thread may not have read the current phase yet
        self._error = error
        self._wake_thread()
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # torchrun sends one more after Ctrl-C
        # The watchdog's thread ends the process well before this.
        threading.Event().wait(2 * self._timeouts.silent + 10.0)
        self._end(1, "".join(traceback.format_exception(error)))

    def _wake_thread(self) -> None:
        """Wake the thread before its next heartbeat is due."""
        with suppress(BlockingIOError):  # the pipe is full, which wakes the thread as well
            os.write(self._waker, b"\0")

    # The watchdog's own thread calls these.

    def _watch(self) -> None:
        """Run the first thread, which exchanges heartbeats until the rank is done."""
        try:
            while not self._finished():
                self._round()
                self._sleep()
            self._over.set()
        except RuntimeError as error:  # what torch's stores raise
            if self._published_ending != "finished":  # otherwise all are done, and the rank that serves the store has left
                self._end_without_store(str(error))
            self._over.set()
        except Exception as error:
            self._end(1, f"{traceback.format_exc()}error: {self._describe_rank()}: the watch failed: {error}\n")

    def _sleep(self) -> None:
        """Sleep until the next heartbeat is due, or `_wake_thread` is called."""
        if select.select([self._wake], [], [], self._timeouts.period)[0]:
            os.read(self._wake, 512)

    def _ends_early(self) -> bool:
        """Return whether a signal asks for the end, and no training loop is there to answer it."""
        return self._signals.name is not None and not self._signals.held

    def _finished(self) -> bool:
        """Return whether this rank's work is done, and no other rank needs the store that it may serve."""
        if not self._stopping.is_set():
            return False
        self._exchange(self._others if self._keeps_store else [])
        return not self._keeps_store or all(peer.beat.ending for peer in self._peers.values())

    def _round(self) -> None:
        """Exchange heartbeats once, and react to a failure, a dead or frozen rank, or a hang of this rank."""
        looking = self._signals.name is not None and (self._ends_early() or self._signal_age < self._timeouts.settle)
        troubled = looking or self._error is not None
        everyone = troubled or len(self._peers) < len(self._others)
        passed = self._exchange(self._others if everyone else self._neighbours)
        if self._error is not None and not is_secondary_error(self._error):
            self._publish(self._describe_error(self._error), exit_status(self._error))
        ranks = sorted(self._peers) if everyone else self._neighbours
        if any(self._problem(rank, troubled) for rank in ranks):
            # A process that is gone may have reported its end after its heartbeat was read.
            self._exchange(self._others)
            for rank in ranks:
                if (problem := self._problem(rank, troubled)) is not None:
                    self._publish(f"error: {self._describe_rank(rank)}: {problem}\n")
        if troubled:
            self._signal_age += passed if looking else 0.0
            self._error_age += passed if self._error is not None else 0.0
            self._look_for_cause()
        elif self._ending == "" and (seconds_left := self._seconds_left()) is not None and seconds_left <= 0:
            self._report_hang()

    def _problem(self, rank: int, troubled: bool) -> str | None:
        return self._peers[rank].problem(self._timeouts, self._process, trouble=troubled)

    def _look_for_cause(self) -> None:
        """After a signal or a communication error whose cause is not known yet, decide whether to wait longer or to end."""
        peers, timeouts = self._peers.values(), self._timeouts
        if self._error is not None and self._error_age >= timeouts.settle:
            self._publish(self._describe_error(self._error), exit_status(self._error))
        if not self._ends_early():
            return
        # A rank that never joined has failed, and reported that, before it had a watchdog.
        all_are_ending = len(peers) < len(self._others) or all(peer.beat.ending for peer in peers)
        if not all_are_ending and self._signal_age < timeouts.settle:
            return
        name = self._signals.name or ""
        if self._early is not None:
            self._publish(*self._early(name, self._env.rank))
        if not all_are_ending:
            text = f"error: {self._describe_rank()}: ended by {name}, which other ranks did not get\n"
            self._publish(text, 128 + signal.Signals[name])
        self._leave(128 + signal.Signals[name])

    def _exchange(self, ranks: Sequence[int], ending: str | None = None) -> float:
        """Write this rank's heartbeat, read those of `ranks`; return the seconds since the last round. Follows a failure."""
        now = time.monotonic()
        # At most two periods, so that a pause of this process, or a slow store, does not count as silence of the others.
        passed, self._last_round = min(now - self._last_round, 2 * self._timeouts.period), now
        phase = self._phase
        self._age = self._age + passed if phase is self._seen_phase else 0.0
        self._seen_phase = phase
        self._beat_number += 1
        self._ending = ending or ("finished" if self._stopping.is_set() else "terminated" if self._ends_early() else "")
        beat = Heartbeat(
            self._process,
            self._beat_number,
            describe_phase(self._seen_phase.what),
            round(self._age, 2),
            self._seconds_left(),
            self._ending,
        )
        self._pending_beat = self._beat_number
        self._store.set(f"beat {self._env.rank}", beat.to_bytes().decode())
        self._published_ending = self._ending
        here = [rank for rank in ranks if rank in self._peers or self._store.check([f"beat {rank}"])]
        failure, *beats = self._store.multi_get(["failure", *(f"beat {rank}" for rank in here)])
        self._pending_beat = 0
        for rank, data in zip(here, beats, strict=True):
            read = Heartbeat.from_bytes(data)
            self._peers.setdefault(rank, Peer(read)).update(read, passed)
        if failure != b"-" and ending is None:
            self._follow(failure)
        return passed

    def _seconds_left(self) -> float | None:
        """Return the seconds that this rank's phase may still take; None for a phase without a limit."""
        mode = self._seen_phase.mode
        if mode == WAITING or (self._age > 1.0 and self._communicates()):
            return None
        limit = self._pace.limit(self._seen_phase.kind) if mode == COMPUTING else self._timeout
        # A phase that may wait for others is no excuse for ranks that wait for this one, until it is over its limit.
        return None if mode == DOING and self._age < limit else round(limit - self._age, 2)

    def _communicates(self) -> bool:
        """Return whether the main thread is inside a collective, as a stage's forward is with tensor parallelism."""
        frame = sys._current_frames().get(self._main)
        return frame is not None and str(frame.f_globals.get("__name__", "")).startswith(COMMUNICATION)

    def _describe_rank(self, rank: int | None = None) -> str:
        """Return a description of this rank or another: rank, host and phase."""
        if rank is None or rank == self._env.rank:
            return f"rank {self._env.rank} on host {self._process.host}, {describe_phase(self._seen_phase.what)}"
        beat = self._peers[rank].beat
        # The last heartbeat can be half a second old; the status file, for ranks of the same host, holds the phase at death.
        what = read_status(beat.process, self._process) or beat.what
        return f"rank {rank} on host {beat.process.host}, {what}"

    def _report_hang(self) -> None:
        """End the job because this rank hangs, unless it may wait for a rank whose phase began earlier."""
        phase = self._seen_phase
        self._exchange(self._others)
        if self._phase is not phase or may_wait_for_peer(self._age, list(self._peers.values())):
            return
        longest = self._pace.longest(phase.kind)
        usual = f", where {longest:.2f} s was the longest before" if longest is not None else ""
        frame = sys._current_frames().get(self._main)
        stack = "".join(traceback.format_stack(frame)) if frame is not None else "  unknown\n"
        what = f"hangs, for {self._age:.0f} s{usual} (--hang-timeout-seconds)"
        self._publish(f"error: {self._describe_rank()}: {what}; its main thread is at:\n{stack}")

    def _describe_error(self, error: BaseException) -> str:
        """Return the message of an error that ended this rank's work."""
        if isinstance(error, KeyboardInterrupt):
            return "interrupted\n"
        if isinstance(error, SystemExit):  # its message was printed where it was raised
            return ""
        message = str(error) if isinstance(error, JobError) else self._explain(error, self._describe_rank())
        if message is not None:
            return f"error: {message}\n"
        text = " ".join(str(error).split())[:1000]
        return f"{''.join(traceback.format_exception(error))}error: {self._describe_rank()}: {type(error).__name__}: {text}\n"

    def _publish(self, text: str, status: int = 1) -> NoReturn:
        """Publish a failure, print it and end the process; if another rank's failure was published first, follow that."""
        own = json.dumps({"told by": self._env.rank, "text": text[:10000], "status": status})
        self._pending_beat = self._beat_number
        published = self._store.compare_set("failure", "-", own)
        self._pending_beat = 0
        if published.decode() != own:
            self._follow(published)
        write_stderr(text)
        write_error_file(text)
        self._wait_for_peers_to_end()
        self._leave(status)

    def _follow(self, failure: bytes) -> NoReturn:
        """End this process after another rank has published a failure; that rank ends first."""
        published = json.loads(failure)
        self._exchange([], ending="ended")
        if published["status"] == STOPPED or self._env.job is None:
            time.sleep(2 * self._timeouts.period)
        elif self._signals.wait_for("SIGTERM", within=2 * self._timeouts.period):
            self._leave(0)  # torchrun has seen the other rank end; it would report every other status than 0 as well
        write_error_file(str(published["text"]))  # torchrun reads the file of the first dead rank that it finds
        own = 1 if self._error is None else exit_status(self._error)
        self._leave(published["status"] if published["status"] in (STOPPED, REFUSED) else own)

    def _wait_for_peers_to_end(self) -> None:
        """Wait until no other rank needs this rank or the store; for a few seconds at most."""
        for _ in range(int(self._timeouts.settle / 0.1)):
            self._exchange(self._others, ending="ended")
            if all(peer.has_ended(self._process) for peer in self._peers.values()):
                return
            time.sleep(0.1)

    def _leave(self, status: int) -> NoReturn:
        """End this process, and kill the frozen ones on this host, which cannot end themselves."""
        if self._keeps_store:
            self._wait_for_peers_to_end()
        elif self._ending != "ended":
            self._exchange([], ending="ended")
        for peer in self._peers.values():
            if not peer.beat.ending and peer.quiet >= self._timeouts.settle * 2 / 3:
                peer.beat.process.kill(self._process)
            if peer.beat.process.state(self._process) == "gone":
                remove_status(peer.beat.process)
        self._end(status)

    def _watch_store(self) -> None:
        """Run the second thread, which ends the process if the store does not answer: its host or process may be lost."""
        before, ticks = 0, 0.0
        while not self._over.wait(self._timeouts.period):
            # Counted in ticks, not by the clock, so that a pause of this process does not count as the store's.
            ticks = ticks + self._timeouts.period if self._pending_beat and self._pending_beat == before else 0.0
            before = self._pending_beat
            if ticks >= self._timeouts.silent:
                self._end_without_store(f"no answer for {ticks:.0f} s")

    def _end_without_store(self, why: str) -> NoReturn:
        """End the process, since without the store nothing can be agreed on. The lowest rank on another host reports it."""
        echo = self._signals.name is not None and (self._ends_early() or self._signal_age < self._timeouts.settle)
        if echo or self._ending == "ended":
            self._end(1 if self._signals.name is None else 128 + signal.Signals[self._signals.name])
        if self._error is not None and not is_secondary_error(self._error):
            self._end(exit_status(self._error), self._describe_error(self._error))
        hosts = {rank: peer.beat.process.host for rank, peer in self._peers.items()} | {self._env.rank: self._process.host}
        keeper = f"{self._env.address}:{self._env.port}, on host {hosts.get(0, self._env.address)}"
        away = [rank for rank, host in hosts.items() if host != hosts.get(0)]
        speaker = min(away or [rank for rank in hosts if rank or not serves_store(0)] or [self._env.rank])
        text = ""
        if speaker == self._env.rank:
            first = f"{self._describe_rank(0)}: " if serves_store(0) and 0 in self._peers else ""
            what = "died or is lost, and with it" if first else "contact was lost with"
            text = f"error: {first}{what} the job's store at {keeper} ({' '.join(why.split())[:200]})\n"
        self._end(1, text)

    def _end(self, status: int, text: str = "") -> NoReturn:
        """Exit at once, without destructors, which could block for ever in a collective."""
        write_stderr(text)
        write_error_file(text)
        if self.at_end is not None and all(peer.has_ended(self._process) for peer in self._peers.values()):
            run_briefly(self.at_end)
        self._status_file.wipe()
        os._exit(status)
