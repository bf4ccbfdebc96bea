"""Connection from a run to the process that writes to Weights & Biases. It never blocks, except for some seconds at the end."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from megatron.files.regular import parse_json
from megatron.files.side import MAX_UNWRITTEN, warn

END_SECONDS = 20.0  # how long the end of a run waits for W&B
NAME = "W&B"


class WandbLink:
    """Starts `wandb_writer.py` and sends it messages as fast as it takes them; the others wait in memory.

    Args:
        setup: the first message.
        log: prints a line to the user.
    """

    def __init__(self, setup: Mapping[str, Any], log: Callable[[str], None]) -> None:
        self._log, self._unread = log, b""
        self._waiting: deque[bytes] = deque(maxlen=MAX_UNWRITTEN)  # when it is full, the oldest messages are dropped
        self._rest = b""  # the unsent part of a message that the socket took in part
        self._socket: socket.socket | None = None
        self.done = False
        path = os.pathsep.join(os.path.abspath(part) for part in sys.path)
        try:
            self._socket, theirs = socket.socketpair()
            with theirs:
                self.process = subprocess.Popen(
                    [sys.executable, "-m", "megatron.train.wandb_writer"],
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    env=os.environ | {"PYTHONPATH": path},
                    start_new_session=True,  # so that a Ctrl-C in the terminal does not reach it
                )
            self._socket.setblocking(False)  # a step must never wait for W&B
        except OSError as error:
            self._disconnect(error)
        self.send(setup)

    def send(self, message: Mapping[str, Any]) -> None:
        """Send a message, or queue it until the socket takes more, and log the answers that have come meanwhile."""
        if self._socket is None:
            return
        self._waiting.append(json.dumps(message).encode() + b"\n")
        self._push()
        self._listen()

    def end(self, ended: str) -> None:
        """Send how the run ended, and wait until W&B has everything, END_SECONDS at most."""
        until = time.monotonic() + END_SECONDS
        self.send({"ended": ended})
        while self._socket is not None and (self._waiting or self._rest) and time.monotonic() < until:
            time.sleep(0.02)
            self._push()
        if self._socket is not None:
            self._socket.shutdown(socket.SHUT_WR)
        while self._socket is not None and not self.done and time.monotonic() < until:
            time.sleep(0.02)
            self._listen()
        if self._socket is not None:
            self._socket.close()
            if not self.done:
                later = "the rest is sent behind the run's back, or later by `wandb sync`"
                warn(NAME, "not everything is sent", OSError(0, f"{END_SECONDS:g} s were not enough"), later)
            self._socket = None

    def _push(self) -> None:
        while self._socket is not None and (self._rest or self._waiting):
            self._rest = self._rest or self._waiting.popleft()
            try:
                sent = self._socket.send(self._rest, socket.MSG_NOSIGNAL)
            except BlockingIOError:
                return
            except OSError as error:
                self._listen()  # the process may have sent the reason before it ended
                self._disconnect(error)
                return
            self._rest = self._rest[sent:]  # the socket may take a part only

    def _listen(self) -> None:
        """Read the answers of the process; disconnect when it has ended."""
        while self._socket is not None:
            try:
                data = self._socket.recv(1 << 16)
            except BlockingIOError:
                return
            except OSError as error:
                self._disconnect(error)
                return
            *lines, self._unread = (self._unread + data).split(b"\n")
            for line in lines:
                self._handle_answer(parse_json(line))
            if not data:
                self._disconnect(OSError(0, "its process ended"))

    def _handle_answer(self, message: dict[str, Any]) -> None:
        if "info" in message:
            self._log(message["info"])
        elif "failed" in message:
            self.done = self.done or message["failed"] == "cannot be used"
            warn(NAME, message["failed"], OSError(0, message["error"]), message["then"])
        else:
            self.done = True

    def _disconnect(self, error: OSError) -> None:
        if not self.done:
            warn(NAME, "cannot be used any more", error)
        self.done = True
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        self._waiting.clear()
        self._rest = b""
