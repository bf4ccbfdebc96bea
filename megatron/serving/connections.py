"""Deadlines for connections: a client that is silent, sends or reads too slowly loses its connection, and nobody else waits.

uvicorn bounds only the time between two requests of one connection.
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

LINGER = 1.0  # seconds for which a client that has been refused may go on sending, so that it hears why
MIN_RATE = 1024  # bytes a second, at which a client must take what it has asked for


@dataclass(frozen=True)
class ConnectionLimits:
    """What one client may take of the server, in seconds, and how many connections there are at once.

    request_timeout: from connecting, or the first byte of a later request, until a request is there. keep_alive_timeout:
    between two requests. send_timeout: without `MIN_RATE` of progress while a reply waits to be read.
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
    """Return uvicorn's protocol with these limits. log: gets a line for each request that is refused here."""
    import h11
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class GuardedProtocol(H11Protocol):
        """One connection. Its timers: one for a request that arrives, one for a reply that leaves."""

        def connection_made(self, transport: Any) -> None:
            self._arriving: asyncio.TimerHandle | None = None
            self._leaving: asyncio.TimerHandle | None = None
            self._unsent, self._quiet_since, self._refused = 0, self.loop.time(), False
            super().connection_made(transport)
            transport.set_write_buffer_limits(high=0)  # so that `pause_writing` tells of every byte that nobody takes
            self._watch_request()
            self._make_room()

        def connection_lost(self, exc: Exception | None) -> None:
            self._arriving, self._leaving = self._cancelled(self._arriving), self._cancelled(self._leaving)
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            if self._refused:
                return
            super().data_received(data)
            self._watch_request()

        def on_response_complete(self) -> None:
            self._quiet_since = self.loop.time()
            super().on_response_complete()
            self._watch_request()

        @property
        def busy(self) -> bool:
            """Whether a request is here that has not been answered."""
            answered = self.cycle is None or self.cycle.response_complete or self._refused
            return not answered and self.conn.their_state is not h11.SEND_BODY

        def _watch_request(self) -> None:
            """Run the timer from the first to the last byte of a request; between two of them uvicorn's own runs."""
            if self._refused:
                return
            begun = self.conn.their_state is h11.IDLE and self.timeout_keep_alive_task is None
            if self.transport.is_closing() or not (begun or self.conn.their_state is h11.SEND_BODY):
                self._arriving = self._cancelled(self._arriving)
            elif self._arriving is None:
                self._arriving = self.loop.call_later(limits.request_timeout, self._too_late)

        def _too_late(self) -> None:
            self._arriving = None
            if self.conn.their_state is h11.SEND_BODY or self.conn.trailing_data[0]:
                self._refuse(408, f"the request was not here whole after {limits.request_timeout:g} s (--request-timeout)")
            else:
                self.transport.close()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._unsent = self.transport.get_write_buffer_size()
            self._leaving = self._cancelled(self._leaving)
            self._leaving = self.loop.call_later(limits.send_timeout, self._look_at_reply)

        def resume_writing(self) -> None:
            self._leaving = self._cancelled(self._leaving)
            super().resume_writing()

        def _look_at_reply(self) -> None:
            before, self._unsent = self._unsent, self.transport.get_write_buffer_size()
            if before - self._unsent >= MIN_RATE * limits.send_timeout:
                self._leaving = self.loop.call_later(limits.send_timeout, self._look_at_reply)
                return
            log(f"{self._name()}: closed, since the reply was not read for {limits.send_timeout:g} s (--send-timeout)")
            self.transport.abort()

        def _make_room(self) -> None:
            """Close the connection that has been quiet longest where there are too many; this one where all have requests."""
            if len(self.connections) <= limits.max_connections:
                return
            others = [other for other in self.connections if isinstance(other, GuardedProtocol) and other is not self]
            idle = [other for other in others if not other.busy]
            if idle:
                oldest = min(idle, key=lambda other: other._quiet_since)
                self.connections.discard(oldest)
                oldest.transport.abort()
            else:
                self._refuse(503, f"{limits.max_connections} requests are open already (--max-connections): try again later")

        def send_400_response(self, msg: str) -> None:
            """Answer what is no HTTP. uvicorn calls it where it handles h11's error."""
            error = sys.exc_info()[1]
            status = getattr(error, "error_status_hint", 400)
            self._refuse(status, f"the request is no HTTP that this server reads: {error or msg}")

        def _refuse(self, status: int, message: str) -> None:
            """Answer where there is no answer yet, and close the connection."""
            error = RequestError(message, status=status)
            body = json.dumps(error.body()).encode()
            kind = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
            reason = HTTPStatus(status).phrase.encode()
            try:
                events = (
                    h11.Response(status_code=status, headers=[*kind, (b"connection", b"close")], reason=reason),
                    h11.Data(data=body),
                    h11.EndOfMessage(),
                )
                self.transport.write(b"".join(self.conn.send(event) or b"" for event in events))
            except h11.LocalProtocolError:  # an answer has begun already, or must have no body
                self.transport.abort()
                return
            log(f"{self._name()}: status {status}, {one_line(str(error))}")
            self._refused = True
            if self.cycle is not None:  # an application that waits for the body waits no longer
                self.cycle.disconnected = True
                self.cycle.message_event.set()
            self.transport.write_eof()
            self._arriving = self._cancelled(self._arriving)
            self._arriving = self.loop.call_later(LINGER, self.transport.close)

        def _should_upgrade(self) -> bool:
            return False  # a client that asks for a WebSocket gets HTTP

        def _name(self) -> str:
            return self.client[0] if self.client else "?"

        @staticmethod
        def _cancelled(timer: asyncio.TimerHandle | None) -> None:
            if timer is not None:
                timer.cancel()

    return GuardedProtocol
