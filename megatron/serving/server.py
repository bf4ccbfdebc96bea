"""Run the server: open the port, run uvicorn on a background thread, and the engine on the main thread.

The model runs on the main thread, since the watchdog of a job with several ranks observes that one.
"""

from __future__ import annotations

import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from megatron.launch.packages import install_command
from megatron.launch.signals import StopSignals
from megatron.serving.app import Service, build_app
from megatron.serving.connections import ConnectionLimits, guarded_protocol
from megatron.serving.engine import Engine

GRACE = 5  # seconds for replies that are in progress when the server is stopped


class ServerError(ValueError):
    """The server cannot start.

    Attributes:
        status: the exit status.
    """

    status = 2


def require_packages() -> None:
    """Raise ServerError if the extra `server` is not installed."""
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ServerError(f"the server needs the package {error.name}: {install_command('uvicorn')}") from error


def open_port(host: str, port: int) -> socket.socket:
    """Return a bound socket that does not listen yet.

    Raises:
        ServerError: the port is in use, or the host unknown.
    """
    if not 0 <= port <= 65535:
        raise ServerError(f"--port {port} is none; legal: 0 (any free one) to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ServerError(f"--host {host} is not known: {error.strerror or error}") from error
    opened = socket.socket(family, kind, protocol)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        opened.bind(address)
    except OSError as error:
        opened.close()
        raise _port_error(host, port, error) from error
    return opened


def _port_error(host: str, port: int, error: OSError) -> ServerError:
    """Return the error for a port that cannot be opened."""
    return ServerError(f"--port {port} cannot be opened on {host}: {error.strerror or error}; choose another")


@contextmanager
def listening(service: Service, opened: socket.socket, limits: ConnectionLimits | None = None) -> Iterator[Callable[[], bool]]:
    """Answer requests on another thread inside the block.

    Args:
        service: the model and its limits.
        opened: a bound socket.
        limits: the limits of connections; default `ConnectionLimits()`.

    Yields:
        A function that returns whether requests are still answered.

    Raises:
        ServerError: another process listens on the port already.
    """
    import uvicorn

    host, port = opened.getsockname()[:2]
    try:
        opened.listen(128)
    except OSError as error:
        raise _port_error(host, port, error) from error
    limits = limits or ConnectionLimits()
    config = uvicorn.Config(
        build_app(service),
        http=guarded_protocol(limits, service.log),
        interface="asgi3",
        lifespan="off",
        log_config=None,
        log_level="error",  # invalid HTTP requests are logged by `ConnectionGuard`
        access_log=False,
        proxy_headers=False,  # clients could forge their address in these headers
        timeout_graceful_shutdown=GRACE,
        timeout_keep_alive=limits.keep_alive_timeout,  # type: ignore[arg-type]  # a float works as well
        ws="none",
    )
    # Outside of the main thread uvicorn installs no signal handlers.
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [opened]}, name="http", daemon=True)
    thread.start()
    # An error at the start ends the thread, which the caller finds by the function below.
    while thread.is_alive() and not server.started:
        time.sleep(0.01)
    try:
        yield thread.is_alive
    finally:
        server.should_exit = True
        thread.join(2 * GRACE)
        if service.chat is not None:
            service.chat.close()


@contextmanager
def catch_interrupts() -> Iterator[threading.Event]:
    """Set an event at Ctrl-C inside the block, instead of raising KeyboardInterrupt; only in the main thread."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = signal.signal(signal.SIGINT, lambda number, frame: asked.set())
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


def serve(
    engine: Engine,
    opened: socket.socket | None,
    service: Service | None,
    signals: StopSignals,
    limits: ConnectionLimits | None = None,
) -> None:
    """Serve until SIGTERM, SIGUSR1 or Ctrl-C on any rank. Collective.

    Args:
        engine: this rank's engine.
        opened: a bound socket on rank 0, None on the others.
        service: the model and its limits on rank 0, None on the others.
        signals: the signals that ask this rank to stop.
        limits: the limits of connections.
    """
    signals.hold()
    with catch_interrupts() as interrupted:

        def asked() -> bool:
            return signals.name is not None or interrupted.is_set()

        if opened is None or service is None:
            engine.run(asked)
            return
        with listening(service, opened, limits) as alive:
            host, port = opened.getsockname()[:2]
            shown = f"[{host}]" if ":" in host else host
            log_line(f"serving {service.model} on http://{shown}:{port}")

            def should_stop() -> bool:
                if not alive():
                    raise RuntimeError("the HTTP server's thread has ended")
                return asked()

            engine.run(should_stop)


def log_line(line: str) -> None:
    """Write a line to stderr, and flush it."""
    print(line, file=sys.stderr, flush=True)
