"""Record SIGTERM, SIGUSR1 and Ctrl-C as requests to stop, immediately even while the main thread is blocked."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class InterruptHandler:
    """Reacts to Ctrl-C during training; this base class does nothing. Its methods run in the thread that reads signals.

    Attributes:
        launcher_forwards: the launcher forwards the first Ctrl-C as SIGINT and the second as SIGTERM, as torchrun does.
        echo_seconds: a second signal within this time counts as the same Ctrl-C, which the process received from the terminal
            and again from the launcher.
    """

    launcher_forwards = False
    echo_seconds = 0.0

    def on_first_interrupt(self) -> None:
        """Tell the user how the run reacts."""

    def on_second_interrupt(self, name: str) -> None:
        """End the process at once. name: name of the signal."""


class StopSignals:
    """The signals that asked this process to stop. What follows from them depends on the phase of the run.

    At first the function `at_once`, if given, is called with the signal's name in the thread that reads signals, to end the
    process. After `hand_to_watchdog`, the watchdog of a job of several ranks reads `name` and ends the job. After `hold`, the
    training loop reads it at its next step boundary. Later signals are ignored, except that a second Ctrl-C ends the process.

    Attributes:
        name: name of the first signal; None before it arrives.
        held: `hold` was called.
        answered: the run has saved and is ending, so a second Ctrl-C is ignored too.
    """

    def __init__(self, at_once: Callable[[str], object] | None = None, interrupts: InterruptHandler | None = None) -> None:
        self.name: str | None = None
        self.held = self.answered = False
        self._at_once, self._interrupts = at_once, interrupts
        self._interrupted_at: float | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def install(self) -> None:
        """Install the handlers, in the main thread only, for signals that have no other Python handler.

        An ignored signal gets a handler too, since it may only be inherited: a batch script ignores it to protect the launcher.
        The exception is an ignored SIGINT, since shells make background processes ignore it on purpose.
        """
        free = [number for number in STOP_SIGNALS if signal.getsignal(number) in (signal.SIG_DFL, signal.SIG_IGN)]
        handled: list[signal.Signals] = [number for number in free if number != signal.SIGINT]
        if self._interrupts is not None and signal.getsignal(signal.SIGINT) in (signal.SIG_DFL, signal.default_int_handler):
            handled.append(signal.SIGINT)
        if threading.current_thread() is not threading.main_thread() or not handled:
            return
        self._pipe_reader, self._pipe_writer = os.pipe()
        os.set_blocking(self._pipe_writer, False)
        # The interpreter writes the signal's number to the pipe at once, but a Python handler runs only when the main thread is
        # free. Both record the signal: the handler, so that the main thread sees it as soon as it continues.
        previous_pipe = signal.set_wakeup_fd(self._pipe_writer, warn_on_full_buffer=False)
        if previous_pipe != -1:  # somebody else uses the mechanism
            signal.set_wakeup_fd(previous_pipe)
            os.close(self._pipe_reader)
            os.close(self._pipe_writer)
            return
        for number in handled:
            self._previous[number] = signal.signal(number, lambda number, frame: self._record(number))
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()

    def hand_to_watchdog(self) -> None:
        """From now on leave requests to the watchdog, which reads `name`."""
        self._at_once = None

    def hold(self) -> None:
        """From now on leave requests to the training loop, which reads `name` at step boundaries."""
        self._at_once = None
        self.held = True

    def wait_for(self, name: str, within: float) -> bool:
        """Return whether the first signal has this name; wait up to `within` seconds for it."""
        deadline = time.monotonic() + within
        while self.name != name and time.monotonic() < deadline:
            time.sleep(0.02)
        return self.name == name

    def close(self, *, ignore: bool = False) -> None:
        """Restore the previous handlers; with `ignore`, ignore the signals instead, which a launcher may send at the end."""
        if not self._previous:
            return
        for number, previous in self._previous.items():
            signal.signal(number, signal.SIG_IGN if ignore else previous)
        self._previous.clear()
        signal.set_wakeup_fd(-1)
        os.write(self._pipe_writer, b"\0")
        self._thread.join()
        os.close(self._pipe_reader)
        os.close(self._pipe_writer)

    def _listen(self) -> None:
        """Record and answer the signals whose numbers come through the pipe, until `close` writes a zero: a thread."""
        while True:
            for number in os.read(self._pipe_reader, 64):
                if number == 0:
                    return
                if number not in self._previous:  # the pipe gets every signal with a Python handler, even another program's
                    continue
                self._answer_interrupt(number)
                self._record(number)
                at_once = self._at_once  # read once, since the main thread may set it to None meanwhile
                if at_once is not None and self.name is not None:
                    at_once(self.name)

    def _answer_interrupt(self, number: int) -> None:
        """Call the handler's method for the first or second Ctrl-C if this signal is one."""
        if self._interrupts is None or not self.held or self.answered:
            return
        now, first_at = time.monotonic(), self._interrupted_at
        may_be_second = number == signal.SIGINT or (self._interrupts.launcher_forwards and number == signal.SIGTERM)
        if first_at is None and number == signal.SIGINT:
            self._interrupted_at = now
            self._interrupts.on_first_interrupt()
        elif first_at is not None and may_be_second and now - first_at > self._interrupts.echo_seconds:
            self._interrupts.on_second_interrupt(signal.Signals(number).name)

    def _record(self, number: int) -> None:
        """Record a signal if it is the first."""
        self.name = self.name or signal.Signals(number).name
