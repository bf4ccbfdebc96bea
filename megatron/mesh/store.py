"""The job's key-value store, through which its processes find one another and agree on failures."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Protocol

import torch.distributed as dist

from megatron.mesh.place import Place


class Store(Protocol):
    """What the watch uses of torch's stores. They raise subclasses of RuntimeError when the connection is lost."""

    def set(self, key: str, value: str) -> None: ...
    def check(self, keys: list[str]) -> bool: ...
    def multi_get(self, keys: list[str]) -> Sequence[bytes]: ...
    def compare_set(self, key: str, expected_value: str, desired_value: str) -> bytes: ...


def connect(place: Place, timeout: timedelta, *, again: bool = False) -> Any:
    """A connection to the store that the launcher serves, or else the first rank. again: another one of this process.

    Waits `timeout` for the server; then torch's DistNetworkError. An operation blocks others on the same connection.
    """
    store = dist.TCPStore(  # type: ignore[attr-defined]
        place.address,
        place.port,
        place.world_size,
        is_master=serves_store(place.rank) and not again,
        timeout=timeout,
        wait_for_workers=not again,
        multi_tenant=True,
    )
    # A launcher that starts the processes again keeps its store, and what the last attempt wrote there.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"megatron attempt {attempt}", store)  # type: ignore[attr-defined]


def serves_store(rank: int) -> bool:
    """Whether this rank's process serves the store: the first one, unless the launcher does."""
    return rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
