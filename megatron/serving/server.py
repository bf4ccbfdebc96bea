"""Run the server: bind the port, run uvicorn on a background thread, and the engine with the model on the main thread.

The model runs on the main thread because the watchdog of a job with several ranks observes that thread.
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

GRACE_SECONDS = 5  # time to finish replies that are in progress when the server is stopped


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
        ServerError: the port is invalid or cannot be bound, or the host is unknown.
    """
    if not 0 <= port <= 65535:
        raise ServerError(f"--port {port} is not a port; legal: 0 (any free one) to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ServerError(f"--host {host} is not known: {error.strerror or error}") from error
    bound_socket = socket.socket(family, kind, protocol)
    bound_socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound_socket.bind(address)
    except OSError as error:
        bound_socket.close()
        raise _port_error(host, port, error) from error
    return bound_socket


def _port_error(host: str, port: int, error: OSError) -> ServerError:
    """Return the error for a port that cannot be opened."""
    return ServerError(f"--port {port} cannot be opened on {host}: {error.strerror or error}; choose another")


@contextmanager
def listening(
    service: Service, bound_socket: socket.socket, limits: ConnectionLimits | None = None
) -> Iterator[Callable[[], bool]]:
    """Answer HTTP requests on another thread inside the block.

    Args:
        service: the model and its limits.
        bound_socket: the socket from `open_port`.
        limits: the limits of connections; None for the defaults.

    Yields:
        A function that returns whether that thread is still alive.

    Raises:
        ServerError: another process listens on the port already.
    """
    import uvicorn

    host, port = bound_socket.getsockname()[:2]
    try:
        bound_socket.listen(128)
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
        timeout_graceful_shutdown=GRACE_SECONDS,
        timeout_keep_alive=limits.keep_alive_timeout,  # type: ignore[arg-type]  # a float works as well
        ws="none",
    )
    # On another than the main thread, uvicorn installs no signal handlers.
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound_socket]}, name="http", daemon=True)
    thread.start()
    # An error during startup ends the thread; the caller notices it by the yielded function.
    while thread.is_alive() and not server.started:
        time.sleep(0.01)
    try:
        yield thread.is_alive
    finally:
        server.should_exit = True
        thread.join(2 * GRACE_SECONDS)
        if service.chat is not None:
            service.chat.close()


@contextmanager
def catch_interrupts() -> Iterator[threading.Event]:
    """Yield an event that Ctrl-C sets, instead of raising KeyboardInterrupt; only on the main thread."""
    interrupted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield interrupted
        return
    previous_handler = signal.signal(signal.SIGINT, lambda number, frame: interrupted.set())
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, previous_handler)


def serve(
    engine: Engine,
    bound_socket: socket.socket | None,
    service: Service | None,
    signals: StopSignals,
    limits: ConnectionLimits | None = None,
) -> None:
    """Serve until SIGTERM, SIGUSR1 or Ctrl-C on any rank. Collective.

    Args:
        engine: this rank's engine.
        bound_socket: the socket from `open_port` on rank 0, None on the others.
        service: the model and its limits on rank 0, None on the others.
        signals: the signals that ask this rank to stop.
        limits: the limits of connections; None for the defaults.
    """
    signals.hold()
    with catch_interrupts() as interrupted:

        def stop_requested() -> bool:
            return signals.name is not None or interrupted.is_set()

        if bound_socket is None or service is None:
            engine.run(stop_requested)
            return
        with listening(service, bound_socket, limits) as is_alive:
            host, port = bound_socket.getsockname()[:2]
            display_host = f"[{host}]" if ":" in host else host
            log_line(f"serving {service.model} on http://{display_host}:{port}")

            def should_stop() -> bool:
                if not is_alive():
                    raise RuntimeError("the HTTP server's thread has ended")
                return stop_requested()

            engine.run(should_stop)


def log_line(line: str) -> None:
    """Write a line to stderr, and flush it."""
    print(line, file=sys.stderr, flush=True)
