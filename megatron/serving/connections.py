"""Limit the number and duration of connections, so that silent or slow clients are disconnected and do not block others.

uvicorn itself limits only the time between two requests of one connection.
"""

from __future__ import annotations

import asyncio
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from http import HTTPStatus
from typing import Any

from megatron.serving.fields import RequestError, one_line

LINGER = 1.0  # seconds that a refused connection stays open, so that the client can read the error
MIN_RATE = 1024  # bytes per second at which a client must read its reply


@dataclass(frozen=True)
class ConnectionLimits:
    """Limits of the connections to the server.

    Attributes:
        request_timeout: seconds within which a request must arrive, from the connection or its first byte on.
        keep_alive_timeout: seconds between two requests of a connection.
        send_timeout: seconds within which a client must read its reply at `MIN_RATE`.
        max_connections: maximum number of open connections.
    """

    request_timeout: float = 20.0
    keep_alive_timeout: float = 20.0
    send_timeout: float = 30.0
    max_connections: int = 512

    def __post_init__(self) -> None:
        for field in fields(self):
            value, flag = getattr(self, field.name), f"--{field.name.replace('_', '-')}"
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{flag} {value} allows nothing; legal: a finite number above 0")


def guarded_protocol(limits: ConnectionLimits, log: Callable[[str], object]) -> type[asyncio.Protocol]:
    """Return a subclass of uvicorn's protocol with these limits. log: called with a line for each refused request.

    uvicorn creates an instance for each connection. The overridden methods call `ConnectionGuard`.
    """
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class GuardedProtocol(H11Protocol):
        def connection_made(self, transport: Any) -> None:
            self.guard = ConnectionGuard(self, limits, log)
            super().connection_made(transport)
            transport.set_write_buffer_limits(high=0)  # `pause_writing` is then called whenever a byte is not sent at once
            self.guard.watch_request()
            self.guard.make_room()

        def connection_lost(self, exc: Exception | None) -> None:
            self.guard.cancel()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            if not self.guard.refused:
                super().data_received(data)
                self.guard.watch_request()

        def on_response_complete(self) -> None:
            self.guard.quiet_since = self.loop.time()
            super().on_response_complete()
            self.guard.watch_request()

        def pause_writing(self) -> None:
            super().pause_writing()
            self.guard.watch_reply()

        def resume_writing(self) -> None:
            self.guard.reply_taken()
            super().resume_writing()

        def send_400_response(self, msg: str) -> None:  # uvicorn calls this for h11's errors: the request is not valid HTTP
            error = sys.exc_info()[1]
            status = getattr(error, "error_status_hint", 400)
            self.guard.refuse(status, f"the request is no HTTP that this server reads: {error or msg}")

        def _should_upgrade(self) -> bool:
            return False  # requests for a WebSocket are answered by HTTP

    return GuardedProtocol


class ConnectionGuard:
    """The deadlines of one connection: a timer for the arriving request, and one for the reply that is being sent.

    Args:
        protocol: uvicorn's protocol. This class reads its `conn` (h11's state of the connection), `cycle` (the request that is
            being answered), `transport`, `client` and `connections` (all connections of the server).
        limits: the limits of every connection.
        log: called with a line for each refused request.
    """

    def __init__(self, protocol: Any, limits: ConnectionLimits, log: Callable[[str], object]) -> None:
        self._protocol, self._limits, self._log = protocol, limits, log
        self._arriving, self._leaving = Timer(protocol.loop), Timer(protocol.loop)
        self._unsent = 0  # unsent bytes of the reply when its timer was last started
        self.quiet_since: float = protocol.loop.time()
        self.refused = False

    def cancel(self) -> None:
        """Stop both timers."""
        self._arriving.cancel()
        self._leaving.cancel()

    @property
    def busy(self) -> bool:
        """True while a request has arrived that has not been answered."""
        cycle = self._protocol.cycle
        answered = cycle is None or cycle.response_complete or self.refused
        return not answered and not self._body_arrives()

    def _body_arrives(self) -> bool:
        """Return whether the rest of a request's body is expected."""
        import h11

        return self._protocol.conn.their_state is h11.SEND_BODY

    def _head_arrives(self) -> bool:
        """Return whether a request's first line and headers are expected. Between two requests uvicorn's timer runs."""
        import h11

        return self._protocol.conn.their_state is h11.IDLE and self._protocol.timeout_keep_alive_task is None

    def watch_request(self) -> None:
        """Run the timer from the first to the last byte of a request."""
        if self.refused:
            return
        if self._protocol.transport.is_closing() or not (self._head_arrives() or self._body_arrives()):
            self._arriving.cancel()
        elif not self._arriving.running:
            self._arriving.start(self._limits.request_timeout, self._too_late)

    def _too_late(self) -> None:
        """Refuse a request that did not arrive in time; close a connection on which nothing has arrived."""
        self._arriving.cancel()
        if self._body_arrives() or self._protocol.conn.trailing_data[0]:
            limit = self._limits.request_timeout
            self.refuse(408, f"the request was not here whole after {limit:g} s (--request-timeout)")
        else:
            self._protocol.transport.close()

    def watch_reply(self) -> None:
        """Start the timer of a reply that the client must read."""
        self._unsent = self._protocol.transport.get_write_buffer_size()
        self._leaving.start(self._limits.send_timeout, self._check_reply)

    def reply_taken(self) -> None:
        """Stop the timer of the reply."""
        self._leaving.cancel()

    def _check_reply(self) -> None:
        """Abort the connection if its client reads the reply too slowly; otherwise start the timer again."""
        seconds, before = self._limits.send_timeout, self._unsent
        self._unsent = self._protocol.transport.get_write_buffer_size()
        if before - self._unsent >= MIN_RATE * seconds:
            self._leaving.start(seconds, self._check_reply)
            return
        self._log(f"{self._client()}: closed, since the reply was not read for {seconds:g} s (--send-timeout)")
        self._protocol.transport.abort()

    def make_room(self) -> None:
        """If there are too many connections, close the one that has been idle longest, or refuse this one if none is idle."""
        protocol, limit = self._protocol, self._limits.max_connections
        if len(protocol.connections) <= limit:
            return
        # Closing a connection without a request loses nothing: its client can connect again.
        idle = [other for other in protocol.connections if other is not protocol and not other.guard.busy]
        if idle:
            oldest = min(idle, key=lambda other: other.guard.quiet_since)
            protocol.connections.discard(oldest)
            oldest.transport.abort()
        else:
            self.refuse(503, f"{limit} requests are open already (--max-connections): try again later")

    def refuse(self, status: int, message: str) -> None:
        """Send an error, unless a reply has begun, and close the connection."""
        import h11

        protocol, error = self._protocol, RequestError(message, status=status)
        body = json.dumps(error.body()).encode()
        kind = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        reason = HTTPStatus(status).phrase.encode()
        try:
            events = (
                h11.Response(status_code=status, headers=[*kind, (b"connection", b"close")], reason=reason),
                h11.Data(data=body),
                h11.EndOfMessage(),
            )
            protocol.transport.write(b"".join(protocol.conn.send(event) or b"" for event in events))
        except h11.LocalProtocolError:  # a reply has begun already, or must not have a body
            protocol.transport.abort()
            return
        self._log(f"{self._client()}: status {status}, {one_line(str(error))}")
        self.refused = True
        if protocol.cycle is not None:  # wakes an application that waits for the rest of the body
            protocol.cycle.disconnected = True
            protocol.cycle.message_event.set()
        protocol.transport.write_eof()
        self._arriving.start(LINGER, protocol.transport.close)

    def _client(self) -> str:
        return self._protocol.client[0] if self._protocol.client else "?"


class Timer:
    """A delayed call on an event loop, which can be restarted or cancelled."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._due: asyncio.TimerHandle | None = None

    @property
    def running(self) -> bool:
        """True from `start` until `cancel`, even after the call."""
        return self._due is not None

    def start(self, seconds: float, call: Callable[[], object]) -> None:
        """Make this call after so many seconds; replaces an earlier one."""
        self.cancel()
        self._due = self._loop.call_later(seconds, call)

    def cancel(self) -> None:
        """Cancel the call."""
        if self._due is not None:
            self._due.cancel()
        self._due = None
