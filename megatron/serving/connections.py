"""Limit the number of connections and the time of requests and replies, so that silent or slow clients do not block others.

uvicorn itself limits only the time between two requests on one connection.
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

LINGER_SECONDS = 1.0  # seconds that a refused connection stays open, so that the client can read the error
MIN_BYTES_PER_SECOND = 1024  # minimum rate at which a client must read its reply


@dataclass(frozen=True)
class ConnectionLimits:
    """Limits of the connections to the server.

    Attributes:
        request_timeout: seconds within which a request must be complete, counted from the connection's opening or, for later
            requests on the same connection, from the request's first byte.
        keep_alive_timeout: maximum seconds between two requests on one connection.
        send_timeout: a client that reads its reply slower than `MIN_BYTES_PER_SECOND` for so many seconds is disconnected.
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
                raise ValueError(f"{flag} {value} is no limit; legal: a finite number above 0")


def guarded_protocol(limits: ConnectionLimits, log: Callable[[str], object]) -> type[asyncio.Protocol]:
    """Return a subclass of uvicorn's protocol that enforces these limits. uvicorn creates an instance for each connection.

    Args:
        limits: the limits of every connection.
        log: called with a line for each refused request and each closed connection.
    """
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class GuardedProtocol(H11Protocol):
        def connection_made(self, transport: Any) -> None:
            self.guard = ConnectionGuard(self, limits, log)
            super().connection_made(transport)
            transport.set_write_buffer_limits(high=0)  # so that `pause_writing` is called as soon as a byte cannot be sent
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
            self.guard.idle_since = self.loop.time()
            super().on_response_complete()
            self.guard.watch_request()

        def pause_writing(self) -> None:
            super().pause_writing()
            self.guard.watch_reply()

        def resume_writing(self) -> None:
            self.guard.reply_sent()
            super().resume_writing()

        def send_400_response(self, msg: str) -> None:  # uvicorn calls this for h11's errors: the request is not valid HTTP
            error = sys.exc_info()[1]
            status = getattr(error, "error_status_hint", 400)
            self.guard.refuse(status, f"the request is not valid HTTP: {error or msg}")

        def _should_upgrade(self) -> bool:
            return False  # a request for a WebSocket is answered as an ordinary HTTP request

    return GuardedProtocol


class ConnectionGuard:
    """The deadlines of one connection: a timer for the arriving request, and one for the reply that is being sent.

    Args:
        protocol: uvicorn's protocol. Its attributes `conn` (h11's state of the connection), `cycle` (the current request and
            its response), `transport`, `client` and `connections` (all connections of the server) are used.
        limits: the limits of every connection.
        log: called with a line for each refused request and each closed connection.

    Attributes:
        idle_since: the event loop's time when the connection was opened, or when its last response was complete.
        refused: an error was sent, and further data is ignored until the connection closes.
    """

    def __init__(self, protocol: Any, limits: ConnectionLimits, log: Callable[[str], object]) -> None:
        self._protocol, self._limits, self._log = protocol, limits, log
        self._request_timer, self._reply_timer = Timer(protocol.loop), Timer(protocol.loop)
        self._unsent = 0  # number of buffered bytes of the reply when its timer was last started
        self.idle_since: float = protocol.loop.time()
        self.refused = False

    def cancel(self) -> None:
        """Stop both timers."""
        self._request_timer.cancel()
        self._reply_timer.cancel()

    @property
    def busy(self) -> bool:
        """True from a request's last byte until the end of its response."""
        cycle = self._protocol.cycle
        answered = cycle is None or cycle.response_complete or self.refused
        return not answered and not self._expects_body()

    def _expects_body(self) -> bool:
        """Return whether a request's head has arrived, and its body has not completely."""
        import h11

        return self._protocol.conn.their_state is h11.SEND_BODY

    def _expects_head(self) -> bool:
        """Return whether a request's head is expected. Between two requests, uvicorn's keep-alive timer runs instead."""
        import h11

        return self._protocol.conn.their_state is h11.IDLE and self._protocol.timeout_keep_alive_task is None

    def watch_request(self) -> None:
        """Run the request timer as long as a request is due or incomplete."""
        if self.refused:
            return
        if self._protocol.transport.is_closing() or not (self._expects_head() or self._expects_body()):
            self._request_timer.cancel()
        elif not self._request_timer.armed:
            self._request_timer.start(self._limits.request_timeout, self._end_late_request)

    def _end_late_request(self) -> None:
        """Refuse an incomplete request with an error; close a connection on which no byte of a request has arrived."""
        self._request_timer.cancel()
        if self._expects_body() or self._protocol.conn.trailing_data[0]:
            limit = self._limits.request_timeout
            self.refuse(408, f"the request was not complete after {limit:g} s (--request-timeout)")
        else:
            self._protocol.transport.close()

    def watch_reply(self) -> None:
        """Start the reply timer, since bytes wait until the client reads."""
        self._unsent = self._protocol.transport.get_write_buffer_size()
        self._reply_timer.start(self._limits.send_timeout, self._check_reply)

    def reply_sent(self) -> None:
        """Stop the reply timer, since no bytes wait."""
        self._reply_timer.cancel()

    def _check_reply(self) -> None:
        """Abort the connection if its client reads the reply too slowly; otherwise restart the timer."""
        seconds, before = self._limits.send_timeout, self._unsent
        self._unsent = self._protocol.transport.get_write_buffer_size()
        if before - self._unsent >= MIN_BYTES_PER_SECOND * seconds:
            self._reply_timer.start(seconds, self._check_reply)
            return
        self._log(f"{self._client()}: closed, since the reply was read too slowly for {seconds:g} s (--send-timeout)")
        self._protocol.transport.abort()

    def make_room(self) -> None:
        """If there are too many connections, close the one that is idle longest, or refuse the new one if none is idle."""
        protocol, limit = self._protocol, self._limits.max_connections
        if len(protocol.connections) <= limit:
            return
        # Closing a connection without a complete request interrupts no work, and its client can connect again.
        idle = [other for other in protocol.connections if other is not protocol and not other.guard.busy]
        if idle:
            oldest = min(idle, key=lambda other: other.guard.idle_since)
            protocol.connections.discard(oldest)
            oldest.transport.abort()
        else:
            self.refuse(503, f"{limit} requests are being answered (--max-connections): try again later")

    def refuse(self, status: int, message: str) -> None:
        """Send an error and close the connection; if a reply has begun, abort the connection instead."""
        import h11

        protocol, error = self._protocol, RequestError(message, status=status)
        body = json.dumps(error.body()).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        reason = HTTPStatus(status).phrase.encode()
        try:
            events = (
                h11.Response(status_code=status, headers=[*headers, (b"connection", b"close")], reason=reason),
                h11.Data(data=body),
                h11.EndOfMessage(),
            )
            protocol.transport.write(b"".join(protocol.conn.send(event) or b"" for event in events))
        except h11.LocalProtocolError:  # a reply has begun, or must not have a body
            protocol.transport.abort()
            return
        self._log(f"{self._client()}: status {status}, {one_line(str(error))}")
        self.refused = True
        if protocol.cycle is not None:  # wake the application if it waits for the rest of the body
            protocol.cycle.disconnected = True
            protocol.cycle.message_event.set()
        protocol.transport.write_eof()
        self._request_timer.start(LINGER_SECONDS, protocol.transport.close)

    def _client(self) -> str:
        return self._protocol.client[0] if self._protocol.client else "?"


class Timer:
    """A delayed call on an event loop, which can be restarted or cancelled."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._handle: asyncio.TimerHandle | None = None

    @property
    def armed(self) -> bool:
        """True from `start` until `cancel`, even after the call was made."""
        return self._handle is not None

    def start(self, seconds: float, call: Callable[[], object]) -> None:
        """Schedule a call in so many seconds, instead of an earlier one."""
        self.cancel()
        self._handle = self._loop.call_later(seconds, call)

    def cancel(self) -> None:
        """Cancel the scheduled call, if there is one."""
        if self._handle is not None:
            self._handle.cancel()
        self._handle = None
