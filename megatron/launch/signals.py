"""Record SIGTERM, SIGUSR1 and Ctrl-C as requests to stop, at once even while the main thread is blocked."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class InterruptHandler:
    """Answers Ctrl-C during training. Its methods are called from another thread than the main one.

    Attributes:
        launcher_forwards: the launcher forwards the first Ctrl-C as SIGINT and the second as SIGTERM, as torchrun does.
        echo_seconds: a second SIGINT within this time is the same Ctrl-C, which reached the process from the terminal and again
            from the launcher.
    """

    launcher_forwards = False
    echo_seconds = 0.0

    def on_first_interrupt(self) -> None:
        """Print what the run does now."""

    def on_second_interrupt(self, name: str) -> None:
        """End the process at once. name: name of the signal."""


class StopSignals:
    """The signals that asked this process to stop. The phase of the run decides how they are answered.

    At first `at_once`, if given, is called with the signal's name, from another thread, and ends the process. After
    `hand_to_watchdog`, the watchdog of a job of several ranks reads `name` and ends the job. After `hold`, the request waits
    for the next step boundary of the training loop. A second signal changes nothing, except that a second Ctrl-C ends the
    process.

    Attributes:
        name: name of the first signal that came; None before.
        held: requests wait for a step boundary.
        answered: the run has saved and is ending, so further signals are ignored.
    """

    def __init__(self, at_once: Callable[[str], object] | None = None, interrupts: InterruptHandler | None = None) -> None:
        self.name: str | None = None
        self.held = self.answered = False
        self._at_once, self._interrupts = at_once, interrupts
        self._interrupted_at: float | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def install(self) -> None:
        """Install the handlers, in the main thread only, for signals that have no other Python handler.

        A signal that is ignored gets a handler, too: a batch script ignores it to protect the launcher, and the ranks inherit
        that. The exception is Ctrl-C, which shells make background processes ignore.
        """
        mine = [number for number in STOP_SIGNALS if signal.getsignal(number) in (signal.SIG_DFL, signal.SIG_IGN)]
        mine = [number for number in mine if number != signal.SIGINT]
        if self._interrupts is not None and signal.getsignal(signal.SIGINT) in (signal.SIG_DFL, signal.default_int_handler):
            mine.append(signal.SIGINT)
        if threading.current_thread() is not threading.main_thread() or not mine:
            return
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        # The interpreter writes the signal's number to the pipe at once, while a Python handler waits for the main thread. Both
        # record it, so that the main thread never continues without a signal that it has received.
        before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        if before != -1:
            signal.set_wakeup_fd(before)
            os.close(self._read)
            os.close(self._write)
            return
        for number in mine:
            self._previous[number] = signal.signal(number, lambda number, frame: self._note(number))
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()

    def hand_to_watchdog(self) -> None:
        """Leave requests to the watchdog, which reads `name`, from now on."""
        self._at_once = None

    def hold(self) -> None:
        """Make requests wait for a step boundary from now on."""
        self._at_once = None
        self.held = True

    def wait_for(self, name: str, within: float) -> bool:
        """Wait up to `within` seconds for this signal to be the first one; return whether it is."""
        until = time.monotonic() + within
        while self.name != name and time.monotonic() < until:
            time.sleep(0.02)
        return self.name == name

    def close(self, *, ignore: bool = False) -> None:
        """Restore the previous handlers. ignore: ignore the signals instead; the launcher may send some as the process ends."""
        if not self._previous:
            return
        for number, previous in self._previous.items():
            signal.signal(number, signal.SIG_IGN if ignore else previous)
        self._previous.clear()
        signal.set_wakeup_fd(-1)
        os.write(self._write, b"\0")
        self._thread.join()
        os.close(self._read)
        os.close(self._write)

    def _listen(self) -> None:
        """Read the numbers of signals from the pipe, in a thread, until `close` writes a zero."""
        while True:
            for number in os.read(self._read, 64):
                if number == 0:
                    return
                if number not in self._previous:  # every signal with a Python handler is written to the pipe
                    continue
                self._interrupted(number)
                self._note(number)
                at_once = self._at_once  # read once, since the main thread may set it to None meanwhile
                if at_once is not None and self.name is not None:
                    at_once(self.name)

    def _interrupted(self, number: int) -> None:
        """Answer Ctrl-C: the first time print what follows, the second time end the process."""
        if self._interrupts is None or not self.held or self.answered:
            return
        now, before = time.monotonic(), self._interrupted_at
        again = number == signal.SIGINT or (self._interrupts.launcher_forwards and number == signal.SIGTERM)
        if before is None and number == signal.SIGINT:
            self._interrupted_at = now
            self._interrupts.on_first_interrupt()
        elif before is not None and again and now - before > self._interrupts.echo_seconds:
            self._interrupts.on_second_interrupt(signal.Signals(number).name)

    def _note(self, number: int) -> None:
        """Record the first signal."""
        self.name = self.name or signal.Signals(number).name
