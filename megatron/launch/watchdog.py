"""End a job of several ranks when one of them dies or hangs, with one error message that names its rank, host and phase.

The heartbeat thread of every rank has its own connection to the job's store. Every half second it writes a heartbeat, reads
those of its neighbours, and checks whether a failure is published. Only the first failure is published and printed. The thread
ends the process even while the main thread is blocked in a collective; a second thread does so if the store does not answer.

An error in a rank's own work is published at once. A communication error, or a launcher's SIGTERM, is mostly a consequence, so
the rank first checks whether another rank died, froze or failed. Without such a cause, SIGTERM is a request to stop: a training
loop stops at its next step boundary, and in any other phase the watchdog ends the job.
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
from megatron.launch.errors import DescribeEarlyStop, Explain, JobError
from megatron.launch.exit_report import exit_status, is_secondary_error, run_briefly, write_error_file, write_stderr
from megatron.launch.heartbeat import DurationTracker, Heartbeat, Peer, Process, WatchdogTimeouts, may_wait_for_peer
from megatron.launch.phase import COMPUTING, LOCAL_WORK, SHARED_WORK, WAITING, Description, Phase, describe_phase
from megatron.launch.signals import StopSignals
from megatron.launch.status_file import StatusFile, read_status, remove_status
from megatron.launch.store import Store, serves_store

STOPPED, REFUSED = 75, 2  # exit statuses of a whole job: stopped on request, or wrong configuration
NO_FAILURE = "-"  # value of the store's key `failure` until a rank publishes one
NEIGHBOURS = 8  # ranks that each rank observes; if each observed all, the store's load would grow with their number squared
COMMUNICATION_MODULES = ("torch.distributed", "megatron.parallel.collectives", "megatron.pipeline.transfer")  # name prefixes


class Watchdog:
    """Receives the phases of a rank's work. This base class, for a single process, ignores them.

    `what` describes the phase, or is a function that does. It is called at every change of phase, so it must be cheap.
    """

    at_end: Callable[[], object] | None = None  # called before the watchdog ends the process, if all other ranks have ended

    def computing(self, kind: str, what: Description) -> None:
        """Begin work that waits for no other rank. It counts as hung if it takes far longer than others of its kind."""

    def doing(self, what: Description, *, alone: bool = False) -> None:
        """Begin work that may take as long as the job's timeout. alone: the work does not wait for other ranks."""

    def waiting(self, what: Description) -> None:
        """Begin to wait for other ranks or for the device, without a time limit."""

    def idle(self) -> None:
        """End the current phase without beginning a named one."""


class JobWatchdog(Watchdog):
    """The watchdog of one rank of several: `start`, then the phases, then `stop` or `fail`.

    Args:
        store: a connection to the job's store that only this watchdog uses.
        env: the launch environment of this process.
        timeout: limit of `doing` phases, and upper bound of the limit of computations: --distributed-timeout-minutes.
        owns_store: this process serves the store, so it must end last.
        timeouts: limits of heartbeats and computations.
        explain: returns the message of an error that needs no traceback.
        signals: the requests to stop that this process received.
        describe_early_stop: message, status for a signal before `signals.hold()`; default 128 + signal, text if others go on.
    """

    def __init__(
        self,
        store: Store,
        env: LaunchEnvironment,
        timeout: timedelta,
        *,
        owns_store: bool = False,
        timeouts: WatchdogTimeouts | None = None,
        explain: Explain = lambda error, where: None,
        signals: StopSignals | None = None,
        describe_early_stop: DescribeEarlyStop | None = None,
    ) -> None:
        self._store, self._env, self._explain, self._owns_store = store, env, explain, owns_store
        self._timeouts, self._timeout = timeouts or WatchdogTimeouts(), timeout.total_seconds()
        self._process = Process.own()
        self._durations = DurationTracker(self._timeouts.hang, self._timeout, self._timeouts.first)
        self._status_file = StatusFile(self._process)
        self._phase = self._seen_phase = Phase(time.monotonic(), WAITING, "", "starting up")
        self._age = 0.0  # seconds since the heartbeat thread first saw this phase
        self._peers: dict[int, Peer] = {}
        others = [(env.rank + i) % env.world_size for i in range(1, env.world_size)]
        self._others, self._neighbours = others, others[:NEIGHBOURS]
        self._beat_number = self._pending_beat = 0  # _pending_beat: the beat for which the store owes an answer; 0 if none
        self._ending = self._published_ending = ""  # see Heartbeat.ending
        self._error: BaseException | None = None
        self._signals, self._describe_early_stop = signals or StopSignals(), describe_early_stop
        self._signal_age = self._error_age = 0.0  # seconds since the signal, and since the error
        self._stopping, self._over = threading.Event(), threading.Event()
        self._main_thread, self._last_exchange = threading.get_ident(), time.monotonic()
        self._threads: list[threading.Thread] = []

    # The main thread calls these; each takes a few microseconds.

    def computing(self, kind: str, what: Description) -> None:
        """Begin a phase whose limit follows from earlier ones of its kind."""
        self._change(COMPUTING, kind, what)

    def doing(self, what: Description, *, alone: bool = False) -> None:
        """Begin a phase whose limit is the job's timeout."""
        self._change(LOCAL_WORK if alone else SHARED_WORK, "", what)

    def waiting(self, what: Description) -> None:
        """Begin a phase without a time limit."""
        self._change(WAITING, "", what)

    def idle(self) -> None:
        """Begin an unnamed phase without a time limit."""
        self._change(WAITING, "", "between two phases")

    def _change(self, mode: str, kind: str, what: Description) -> None:
        """Begin a phase, and record the duration of the previous one if it was a computation."""
        now, ended = time.monotonic(), self._phase
        if ended.mode == COMPUTING:
            self._durations.record(ended.kind, now - ended.since)
        self._phase = Phase(now, mode, kind, what)
        self._status_file.write(describe_phase(what))

    def start(self) -> None:
        """Start the two threads."""
        self._wake_reader, self._wake_writer = os.pipe()
        os.set_blocking(self._wake_reader, False)
        os.set_blocking(self._wake_writer, False)
        self._store.compare_set("failure", "", NO_FAILURE)
        for run in (self._run_heartbeats, self._watch_store):
            self._threads.append(threading.Thread(target=run, name="watch", daemon=True))
            self._threads[-1].start()

    def stop(self) -> None:
        """End the threads after the rank's work. The rank that serves the store first waits for all others."""
        self._change(WAITING, "", "waiting for the other ranks to finish")
        self._stopping.set()
        self._wake_heartbeat_thread()
        for thread in self._threads:
            thread.join()
        self._status_file.wipe()
        os.close(self._wake_reader)
        os.close(self._wake_writer)

    def fail(self, error: BaseException) -> NoReturn:
        """Have the heartbeat thread end the process after an error; it finds the cause, and one rank reports that."""
        self._seen_phase = self._phase  # the heartbeat thread may not have read the current phase yet
        self._error = error
        self._wake_heartbeat_thread()
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # torchrun sends another SIGINT after Ctrl-C
        threading.Event().wait(2 * self._timeouts.silent + 10.0)  # the heartbeat thread ends the process well before this
        self._end(1, "".join(traceback.format_exception(error)))

    def _wake_heartbeat_thread(self) -> None:
        """Wake the heartbeat thread before its next heartbeat is due."""
        with suppress(BlockingIOError):  # the pipe is full, so the thread wakes anyway
            os.write(self._wake_writer, b"\0")

    # The heartbeat thread calls these.

    def _run_heartbeats(self) -> None:
        """Exchange heartbeats until the rank's work is done: the heartbeat thread."""
        try:
            while not self._finished():
                self._run_round()
                # Sleep until the next heartbeat is due, or `_wake_heartbeat_thread` is called.
                if select.select([self._wake_reader], [], [], self._timeouts.period)[0]:
                    os.read(self._wake_reader, 512)
        except RuntimeError as error:  # torch's stores raise this
            if self._published_ending != "finished":  # otherwise all ranks are done, and rank 0 has closed the store
                self._end_without_store(str(error))
        except Exception as error:
            self._end(1, f"{traceback.format_exc()}error: {self._describe_rank()}: the watchdog failed: {error}\n")
        self._over.set()

    def _ends_early(self) -> bool:
        """Return whether a signal asks this rank to stop, and no training loop will answer it."""
        return self._signals.name is not None and not self._signals.held

    def _signal_is_unresolved(self) -> bool:
        """Return whether this rank received a signal that ends it, or that another rank's failure may yet explain."""
        return self._signals.name is not None and (self._ends_early() or self._signal_age < self._timeouts.settle)

    def _finished(self) -> bool:
        """Return whether this rank is done and no other rank needs its store. Once it is done, write a heartbeat first."""
        if not self._stopping.is_set():
            return False
        self._exchange(self._others if self._owns_store else [])
        return not self._owns_store or all(peer.beat.ending for peer in self._peers.values())

    def _run_round(self) -> None:
        """Exchange heartbeats once, and react to a failure, a dead or frozen rank, or a hang of this rank."""
        signal_is_unresolved = self._signal_is_unresolved()
        failure_suspected = signal_is_unresolved or self._error is not None
        observe_all = failure_suspected or len(self._peers) < len(self._others)
        passed = self._exchange(self._others if observe_all else self._neighbours)
        if self._error is not None and not is_secondary_error(self._error):
            self._publish(self._describe_error(self._error), exit_status(self._error))
        ranks = sorted(self._peers) if observe_all else self._neighbours
        if any(self._problem(rank, failure_suspected) for rank in ranks):
            # A process that has exited may have published its ending after its heartbeat was read.
            self._exchange(self._others)
            for rank in ranks:
                if (problem := self._problem(rank, failure_suspected)) is not None:
                    self._publish(f"error: {self._describe_rank(rank)}: {problem}\n")
        if failure_suspected:
            self._signal_age += passed if signal_is_unresolved else 0.0
            self._error_age += passed if self._error is not None else 0.0
            self._end_without_cause()
        elif self._ending == "" and (seconds_left := self._seconds_left()) is not None and seconds_left <= 0:
            self._report_hang()

    def _problem(self, rank: int, failure_suspected: bool) -> str | None:
        return self._peers[rank].problem(self._timeouts, self._process, failure_suspected=failure_suspected)

    def _end_without_cause(self) -> None:
        """End the process if no cause of its signal or communication error was found in time; otherwise return."""
        peers, timeouts = self._peers.values(), self._timeouts
        if self._error is not None and self._error_age >= timeouts.settle:
            self._publish(self._describe_error(self._error), exit_status(self._error))
        if not self._ends_early():
            return
        # A rank never seen is taken to have failed, and reported that, before its watchdog started: the job is ending.
        all_are_ending = len(peers) < len(self._others) or all(peer.beat.ending for peer in peers)
        if not all_are_ending and self._signal_age < timeouts.settle:
            return
        name = self._signals.name or ""
        if self._describe_early_stop is not None:
            self._publish(*self._describe_early_stop(name, self._env.rank))
        if not all_are_ending:
            text = f"error: {self._describe_rank()}: ended by {name}, which other ranks did not receive\n"
            self._publish(text, 128 + signal.Signals[name])
        self._leave(128 + signal.Signals[name])

    def _exchange(self, ranks: Sequence[int], ending: str | None = None) -> float:
        """Write a heartbeat, read those of `ranks`, follow a published failure; return the seconds since the last exchange."""
        now = time.monotonic()
        # At most two periods, so that a pause of this process, or a slow store, does not count as silence of others.
        passed, self._last_exchange = min(now - self._last_exchange, 2 * self._timeouts.period), now
        phase = self._phase
        self._age = self._age + passed if phase is self._seen_phase else 0.0
        self._seen_phase = phase
        self._beat_number += 1
        self._ending = ending or ("finished" if self._stopping.is_set() else "terminated" if self._ends_early() else "")
        what, seconds_left = describe_phase(phase.what), self._seconds_left()
        beat = Heartbeat(self._process, self._beat_number, what, round(self._age, 2), seconds_left, self._ending)
        self._pending_beat = self._beat_number
        self._store.set(f"beat {self._env.rank}", beat.to_bytes().decode())
        self._published_ending = self._ending
        joined = [rank for rank in ranks if rank in self._peers or self._store.check([f"beat {rank}"])]
        failure, *beats = self._store.multi_get(["failure", *(f"beat {rank}" for rank in joined)])
        self._pending_beat = 0
        for rank, data in zip(joined, beats, strict=True):
            peer_beat = Heartbeat.from_bytes(data)
            self._peers.setdefault(rank, Peer(peer_beat)).update(peer_beat, passed)
        if failure != NO_FAILURE.encode() and ending is None:
            self._follow(failure)
        return passed

    def _seconds_left(self) -> float | None:
        """Return the seconds left of this phase; None if it waits, communicates, or is shared work within its limit."""
        mode = self._seen_phase.mode
        if mode == WAITING or (self._age > 1.0 and self._communicates()):
            return None
        limit = self._durations.limit(self._seen_phase.kind) if mode == COMPUTING else self._timeout
        # Shared work may be waiting for a hung rank; a number would let `may_wait_for_peer` excuse that rank's hang.
        return None if mode == SHARED_WORK and self._age < limit else round(limit - self._age, 2)

    def _communicates(self) -> bool:
        """Return whether the main thread is inside a collective; with tensor parallelism even a computation has some."""
        frame = sys._current_frames().get(self._main_thread)
        return frame is not None and str(frame.f_globals.get("__name__", "")).startswith(COMMUNICATION_MODULES)

    def _describe_rank(self, rank: int | None = None) -> str:
        """Return a description of this rank or another: rank, host and phase."""
        if rank is None or rank == self._env.rank:
            return f"rank {self._env.rank} on host {self._process.host}, {describe_phase(self._seen_phase.what)}"
        beat = self._peers[rank].beat
        # The last heartbeat can be half a second old; the status file of a rank on this host names its phase at death.
        what = read_status(beat.process, self._process) or beat.what
        return f"rank {rank} on host {beat.process.host}, {what}"

    def _report_hang(self) -> None:
        """End the job because this rank hangs, unless it may wait for a rank whose phase began earlier."""
        phase = self._seen_phase
        self._exchange(self._others)
        if self._phase is not phase or may_wait_for_peer(self._age, list(self._peers.values())):
            return
        longest = self._durations.longest(phase.kind)
        usual = f", the longest so far took {longest:.2f} s" if longest is not None else ""
        by_timeout = phase.mode != COMPUTING or self._durations.limit(phase.kind) >= self._timeout
        flag = "--distributed-timeout-minutes" if by_timeout else "--hang-timeout-seconds"
        frame = sys._current_frames().get(self._main_thread)
        stack = "".join(traceback.format_stack(frame)) if frame is not None else "  unknown\n"
        what = f"hangs: it has taken {self._age:.0f} s{usual} ({flag})"
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
        own = json.dumps({"rank": self._env.rank, "text": text[:10000], "status": status})
        self._pending_beat = self._beat_number
        published = self._store.compare_set("failure", NO_FAILURE, own)
        self._pending_beat = 0
        if published.decode() != own:
            self._follow(published)
        write_stderr(text)
        write_error_file(text)
        self._wait_for_peers_to_end()
        self._leave(status)

    def _follow(self, failure: bytes) -> NoReturn:
        """End this process shortly after the rank that published `failure`, which must end first."""
        published = json.loads(failure)
        self._exchange([], ending="ended")
        if published["status"] == STOPPED or self._env.job is None:
            time.sleep(2 * self._timeouts.period)
        elif self._signals.wait_for("SIGTERM", within=2 * self._timeouts.period):
            self._leave(0)  # torchrun has seen the other rank end, and would report this one as well if its status were not 0
        write_error_file(str(published["text"]))  # torchrun reads the file of the first dead rank that it finds
        own_status = 1 if self._error is None else exit_status(self._error)
        self._leave(published["status"] if published["status"] in (STOPPED, REFUSED) else own_status)

    def _wait_for_peers_to_end(self) -> None:
        """Wait, a few seconds at most, until no other rank needs this rank or the store."""
        for _ in range(int(self._timeouts.settle / 0.1)):
            self._exchange(self._others, ending="ended")
            if all(peer.has_ended(self._process) for peer in self._peers.values()):
                return
            time.sleep(0.1)

    def _leave(self, status: int) -> NoReturn:
        """End this process, and kill frozen ranks on this host, which cannot end themselves."""
        if self._owns_store:
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
        """End the process if the store does not answer, since its host or process may be lost: the second thread."""
        previous_beat, waited = 0, 0.0
        while not self._over.wait(self._timeouts.period):
            # Periods are counted instead of reading the clock, so that a pause of this process does not count as the store's.
            waited = waited + self._timeouts.period if self._pending_beat and self._pending_beat == previous_beat else 0.0
            previous_beat = self._pending_beat
            if waited >= self._timeouts.silent:
                self._end_without_store(f"no answer for {waited:.0f} s")

    def _end_without_store(self, why: str) -> NoReturn:
        """End the process after losing the store. If possible, a rank on another host than the store's reports it."""
        if self._signal_is_unresolved() or self._ending == "ended":
            self._end(1 if self._signals.name is None else 128 + signal.Signals[self._signals.name])
        if self._error is not None and not is_secondary_error(self._error):
            self._end(exit_status(self._error), self._describe_error(self._error))
        hosts = {rank: peer.beat.process.host for rank, peer in self._peers.items()} | {self._env.rank: self._process.host}
        store_place = f"{self._env.address}:{self._env.port}, on host {hosts.get(0, self._env.address)}"
        remote = [rank for rank, host in hosts.items() if host != hosts.get(0)]
        reporter = min(remote or [rank for rank in hosts if rank or not serves_store(0)] or [self._env.rank])
        if reporter != self._env.rank:
            self._end(1)
        server = f"{self._describe_rank(0)}: " if serves_store(0) and 0 in self._peers else ""
        what = "died or is unreachable, and with it" if server else "lost the connection to"
        self._end(1, f"error: {server}{what} the job's store at {store_place} ({' '.join(why.split())[:200]})\n")

    def _end(self, status: int, text: str = "") -> NoReturn:
        """Exit at once, without destructors, which could block for ever in a collective."""
        write_stderr(text)
        write_error_file(text)
        if self.at_end is not None and all(peer.has_ended(self._process) for peer in self._peers.values()):
            run_briefly(self.at_end)
        self._status_file.wipe()
        os._exit(status)
