"""Connect to the job's key-value store, through which its processes find each other and agree on failures."""

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

NAME_LOOKUP_SECONDS = 15.0  # how long the lookup of an unknown host name is repeated


class Store(Protocol):
    """The part of torch's stores that a watchdog uses. They raise subclasses of RuntimeError when the connection is lost."""

    def set(self, key: str, value: str) -> None:
        """Set the value of a key."""

    def check(self, keys: list[str]) -> bool:
        """Return at once whether all keys have values."""
        ...

    def multi_get(self, keys: list[str]) -> Sequence[bytes]:
        """Return the values of keys, after waiting until all have one."""
        ...

    def compare_set(self, key: str, expected_value: str, desired_value: str) -> bytes:
        """Replace the value of a key atomically if it is the expected one; return the key's value afterwards.

        Args:
            key: name of the value.
            expected_value: value to replace; empty for a key without a value.
            desired_value: new value.
        """
        ...


def connect_store(env: LaunchEnvironment, timeout: timedelta, *, again: bool = False) -> Any:
    """Connect to the job's store, which torchrun serves, or under other launchers rank 0.

    Args:
        env: the launch environment of this process.
        timeout: time to wait for the server and the other processes.
        again: open a second connection of this process, for another thread: operations on one connection block each other.

    Raises:
        JobError: the server or a process is missing when the time is up, or the port cannot be opened.
    """
    _check_address(env, min(timeout.total_seconds(), NAME_LOOKUP_SECONDS))
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
    # After a restart torchrun serves the same store, which still contains the keys of the previous attempt.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"megatron attempt {attempt}", store)  # type: ignore[attr-defined]


def _check_address(env: LaunchEnvironment, seconds: float) -> None:
    """Raise JobError if MASTER_ADDR is unknown. The lookup is repeated for some `seconds`, since name servers can be slow."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.getaddrinfo(env.address, env.port, type=socket.SOCK_STREAM)
        except OSError as error:
            if time.monotonic() > deadline:
                what = f"cannot resolve {env.address!r}, the host name of rank 0 ({error.strerror})"
                raise JobError(f"{_describe_process(env)} {what}: set MASTER_ADDR to its name or address", 2) from error
            time.sleep(0.5)
        else:
            return


def _wait_for_server(env: LaunchEnvironment, timeout: timedelta) -> None:
    """Wait until the store's port accepts connections. torch would wait too, but fail with a C++ stack trace."""
    deadline = time.monotonic() + timeout.total_seconds()
    while True:
        try:
            socket.create_connection((env.address, env.port), timeout=max(1.0, deadline - time.monotonic())).close()
        except OSError as error:
            if time.monotonic() > deadline:
                raise _unreachable(env, timeout, error.strerror or str(error)) from error
            time.sleep(0.2)
        else:
            return


def _unreachable(env: LaunchEnvironment, timeout: timedelta, why: str) -> JobError:
    """Return the error for a store that cannot be used: its port is not free, or the server or processes are missing."""
    address = f"{env.address}:{env.port}"
    if "EADDRINUSE" in why or "EACCES" in why or "EADDRNOTAVAIL" in why:
        problem = "is in use by another program" if "EADDRINUSE" in why else "cannot be opened"
        return JobError(f"port {env.port} of host {os.uname().nodename} {problem}: set MASTER_PORT to a free one", 2)
    minutes = f"{timeout.total_seconds() / 60:g} minutes (--distributed-timeout-minutes)"
    if serves_store(env.rank):
        return JobError(
            f"not all {env.world_size} processes connected to {address} within {minutes}: start as many as WORLD_SIZE, all "
            "with this MASTER_ADDR and MASTER_PORT"
        )
    return JobError(
        f"{_describe_process(env)} found no rank 0 at {address} within {minutes}: check that rank 0 runs, that MASTER_ADDR and "
        f"MASTER_PORT are the same on both, and that no firewall separates them ({' '.join(why.split())[:200]})"
    )


def lost_store(env: LaunchEnvironment) -> JobError:
    """Return the error for a store whose server ended right after this process had connected."""
    reason = "rank 0 has ended, and its own message states why"
    return JobError(f"{_describe_process(env)} lost its connection to {env.address}:{env.port}: {reason}")


def _describe_process(env: LaunchEnvironment) -> str:
    """Return rank and host of this process as text."""
    return f"rank {env.rank} on host {os.uname().nodename}"


def serves_store(rank: int) -> bool:
    """Return whether the process of this rank serves the store: rank 0 does, unless torchrun does."""
    return rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
