"""Run the server's process: a port, uvicorn on a thread of its own, and the engine on the main thread until it is asked to end.

The model runs on the main thread, which is the one that the watchdog of a job of several ranks looks at.
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

GRACE = 5  # seconds for replies that are under way when the end has come


class ServerError(ValueError):
    """The server cannot start.

    Attributes:
        status: the exit status.
    """

    status = 2


def require_packages() -> None:
    """Raise ServerError where the extra is not installed."""
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ServerError(f"the server needs the package {error.name}: {install_command('uvicorn')}") from error


def open_port(host: str, port: int) -> socket.socket:
    """Return a bound socket that does not listen yet.

    Raises:
        ServerError: the port is taken, or the host unknown.
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
        raise _taken(host, port, error) from error
    return opened


def _taken(host: str, port: int, error: OSError) -> ServerError:
    """Return the error of a port that cannot be opened."""
    return ServerError(f"--port {port} cannot be opened on {host}: {error.strerror or error}; choose another")


@contextmanager
def listening(service: Service, opened: socket.socket, limits: ConnectionLimits | None = None) -> Iterator[Callable[[], bool]]:
    """Answer requests from another thread while the block lasts.

    Args:
        service: the model and its limits.
        opened: a bound socket.
        limits: of connections; default `ConnectionLimits()`.

    Yields:
        A function that says whether requests are still answered.

    Raises:
        ServerError: another process has come to listen on the port first.
    """
    import uvicorn

    host, port = opened.getsockname()[:2]
    try:
        opened.listen(128)
    except OSError as error:
        raise _taken(host, port, error) from error
    limits = limits or ConnectionLimits()
    config = uvicorn.Config(
        build_app(service),
        http=guarded_protocol(limits, service.log),
        interface="asgi3",
        lifespan="off",
        log_config=None,
        log_level="error",  # what is no HTTP has its own line in the log
        access_log=False,
        proxy_headers=False,  # a client's own word is no address
        timeout_graceful_shutdown=GRACE,
        timeout_keep_alive=limits.keep_alive_timeout,  # type: ignore[arg-type]  # a timer's delay, also a fraction
        ws="none",
    )
    # On a thread of its own, where uvicorn takes no signals over.
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [opened]}, name="http", daemon=True)
    thread.start()
    # An error of the start ends the thread, and the block below finds it dead.
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
    """Note Ctrl-C inside the block, which asks for the end, instead of raising KeyboardInterrupt.

    Does nothing where another thread than the main one calls.
    """
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
        engine: this rank's.
        opened: a bound socket on rank 0, None on the others.
        service: on rank 0, None on the others.
        signals: what asks this rank to stop.
        limits: of connections.
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

            def over() -> bool:
                if not alive():
                    raise RuntimeError("the HTTP server's thread has ended")
                return asked()

            engine.run(over)


def log_line(line: str) -> None:
    """Write one line to stderr, at once."""
    print(line, file=sys.stderr, flush=True)
