"""Connect to the job's key-value store, through which its processes find one another and agree on failures."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Protocol

import torch.distributed as dist

from megatron.launch.environment import LaunchEnvironment
from megatron.launch.errors import JobError

NAME_SECONDS = 15.0  # how long an unknown host name is looked up again


class Store(Protocol):
    """The part of torch's stores that a watchdog uses. They raise subclasses of RuntimeError when the connection is lost."""

    def set(self, key: str, value: str) -> None:
        """Set the value of a key."""

    def check(self, keys: list[str]) -> bool:
        """Return whether all keys have values, without waiting."""
        ...

    def multi_get(self, keys: list[str]) -> Sequence[bytes]:
        """Return the values of keys; waits for those that have none."""
        ...

    def compare_set(self, key: str, expected_value: str, desired_value: str) -> bytes:
        """Replace a value if it is the expected one, atomically; return the value that the key has then.

        Args:
            key: the key.
            expected_value: the value that is replaced; empty for a key without a value.
            desired_value: the new value.
        """
        ...


def connect_store(env: LaunchEnvironment, timeout: timedelta, *, again: bool = False) -> Any:
    """Connect to the job's store, which the launcher serves, or else rank 0.

    Args:
        env: the launcher's environment of this process.
        timeout: time to wait for the server and the other processes.
        again: this is a further connection of this process. Operations on the same connection block one another.

    Raises:
        JobError: no server or not all processes in time; at once if the port is in use.
    """
    _check_address(env, min(timeout.total_seconds(), NAME_SECONDS))
    if not serves_store(env.rank):
        _wait_for_server(env, timeout)
    try:
        store = dist.TCPStore(  # type: ignore[attr-defined]
            env.address,
            env.port,
            env.world_size,
            is_master=serves_store(env.rank) and not again,
            timeout=timeout,
            wait_for_workers=not again,
            multi_tenant=True,
        )
    except RuntimeError as error:
        raise _unreachable(env, timeout, str(error)) from error
    # After a restart torchrun still serves the same store, with the keys of the attempt before.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"megatron attempt {attempt}", store)  # type: ignore[attr-defined]


def _check_address(env: LaunchEnvironment, seconds: float) -> None:
    """Raise JobError if the host's name is unknown. The lookup is repeated for so many seconds, as name servers can be slow."""
    until = time.monotonic() + seconds
    while True:
        try:
            socket.getaddrinfo(env.address, env.port, type=socket.SOCK_STREAM)
        except OSError as error:
            if time.monotonic() > until:
                what = f"finds no host of the name {env.address!r}, where rank 0 should be ({error.strerror})"
                raise JobError(f"{_who(env)} {what}: set MASTER_ADDR to the name or address of its host", 2) from error
            time.sleep(0.5)
        else:
            return


def _wait_for_server(env: LaunchEnvironment, timeout: timedelta) -> None:
    """Wait until the store's port accepts connections. torch waits as well, but fails with a C++ stack trace."""
    until = time.monotonic() + timeout.total_seconds()
    while True:
        try:
            socket.create_connection((env.address, env.port), timeout=max(1.0, until - time.monotonic())).close()
        except OSError as error:
            if time.monotonic() > until:
                raise _unreachable(env, timeout, error.strerror or str(error)) from error
            time.sleep(0.2)
        else:
            return


def _unreachable(env: LaunchEnvironment, timeout: timedelta, why: str) -> JobError:
    """Return the error for a store that cannot be used: its port is not free, no server is there, or processes are missing."""
    where = f"{env.address}:{env.port}"
    if "EADDRINUSE" in why or "EACCES" in why or "EADDRNOTAVAIL" in why:
        trouble = "is in use by another program" if "EADDRINUSE" in why else "cannot be opened"
        return JobError(f"port {env.port} of host {os.uname().nodename} {trouble}: set MASTER_PORT to one that is free", 2)
    minutes = f"{timeout.total_seconds() / 60:g} minutes (--distributed-timeout-minutes)"
    if serves_store(env.rank):
        return JobError(
            f"of {env.world_size} processes not all came to {where} in {minutes}: start as many as WORLD_SIZE says, all with "
            "this MASTER_ADDR and MASTER_PORT"
        )
    return JobError(
        f"{_who(env)} found no rank 0 at {where} in {minutes}: check that it runs, that MASTER_ADDR and MASTER_PORT are its, "
        f"and that no firewall is between them ({' '.join(why.split())[:200]})"
    )


def lost_store(env: LaunchEnvironment) -> JobError:
    """Return the error for a store whose server ended right after this process had connected."""
    return JobError(
        f"{_who(env)} lost its connection to {env.address}:{env.port}: rank 0 has ended, and its own message says why"
    )


def _who(env: LaunchEnvironment) -> str:
    """Return a description of this process: rank and host."""
    return f"rank {env.rank} on host {os.uname().nodename}"


def serves_store(rank: int) -> bool:
    """Return whether this process serves the store: rank 0 does, unless the launcher does."""
    return rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
