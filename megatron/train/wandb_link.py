"""Connect a run to the process that writes to Weights & Biases, without ever blocking, except for some seconds at the end."""

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

MAX_END_SECONDS = 20.0  # how long the end of a run waits for W&B
NAME = "W&B"  # in warnings


class WandbLink:
    """Starts `wandb_writer.py` and sends messages to it. Those that it cannot receive yet are queued in memory.

    Args:
        setup: the first message.
        log: prints a line to the user.
    """

    def __init__(self, setup: Mapping[str, Any], log: Callable[[str], None]) -> None:
        self._log, self._unread = log, b""
        self._waiting: deque[bytes] = deque(maxlen=MAX_UNWRITTEN)  # when full, it drops the oldest messages
        self._rest = b""  # the unsent part of a message that was sent in part
        self._socket: socket.socket | None = None
        self.done = False  # nothing more is expected from the process
        python_path = os.pathsep.join(os.path.abspath(part) for part in sys.path)
        try:
            self._socket, child_socket = socket.socketpair()
            with child_socket:
                self.process = subprocess.Popen(
                    [sys.executable, "-m", "megatron.train.wandb_writer"],
                    stdin=child_socket.fileno(),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    env=os.environ | {"PYTHONPATH": python_path},
                    start_new_session=True,  # so that a Ctrl-C in the terminal does not reach it
                )
            self._socket.setblocking(False)  # a step must never wait for W&B
        except OSError as error:
            self._disconnect(error)
        self.send(setup)

    def send(self, message: Mapping[str, Any]) -> None:
        """Send a message, or queue it until the socket accepts more, and log the replies that have arrived."""
        if self._socket is None:
            return
        self._waiting.append(json.dumps(message).encode() + b"\n")
        self._push()
        self._read_replies()

    def end(self, outcome: str) -> None:
        """Send how the run ended, and wait until W&B has everything, MAX_END_SECONDS at most."""
        deadline = time.monotonic() + MAX_END_SECONDS
        self.send({"ended": outcome})
        while self._socket is not None and (self._waiting or self._rest) and time.monotonic() < deadline:
            time.sleep(0.02)
            self._push()
        if self._socket is not None:
            self._socket.shutdown(socket.SHUT_WR)
        while self._socket is not None and not self.done and time.monotonic() < deadline:
            time.sleep(0.02)
            self._read_replies()
        if self._socket is not None:
            self._socket.close()
            if not self.done:
                consequence = "the rest is sent in the background, or later by `wandb sync`"
                warn(NAME, "not everything is sent", OSError(0, f"{MAX_END_SECONDS:g} s were not enough"), consequence)
            self._socket = None

    def _push(self) -> None:
        """Send queued messages, as many as the socket accepts now."""
        while self._socket is not None and (self._rest or self._waiting):
            self._rest = self._rest or self._waiting.popleft()
            try:
                sent = self._socket.send(self._rest, socket.MSG_NOSIGNAL)
            except BlockingIOError:
                return
            except OSError as error:
                self._read_replies()  # the process may have sent the reason before it ended
                self._disconnect(error)
                return
            self._rest = self._rest[sent:]  # the socket may accept only a part

    def _read_replies(self) -> None:
        """Handle the replies of the process that have arrived; disconnect if it has ended."""
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
                self._handle_reply(parse_json(line))
            if not data:
                self._disconnect(OSError(0, "its process ended"))

    def _handle_reply(self, message: dict[str, Any]) -> None:
        if "info" in message:
            self._log(message["info"])
        elif "failed" in message:
            self.done = self.done or message["failed"] == "cannot be used"
            warn(NAME, message["failed"], OSError(0, message["error"]), message["then"])
        else:
            self.done = True

    def _disconnect(self, error: OSError) -> None:
        if not self.done:
            warn(NAME, "can no longer be used", error)
        self.done = True
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        self._waiting.clear()
        self._rest = b""
