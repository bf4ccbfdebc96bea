"""Processes that do not find one another say so, in time, with the variable that is wrong."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from datetime import timedelta

import pytest

from megatron.launch import job, store
from megatron.launch.environment import LaunchEnvironment
from megatron.launch.errors import JobError
from megatron.launch.store import connect_store

HOST = os.uname().nodename
SHORT = timedelta(seconds=1.0)


@pytest.fixture(autouse=True)
def no_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def test_a_port_that_is_taken() -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(JobError, match="MASTER_PORT") as error:
            connect_store(LaunchEnvironment(0, 2, port=port), SHORT)
    assert str(error.value).startswith(f"port {port} of host {HOST} is in use by another program") and error.value.status == 2


def test_an_unknown_host_name_is_reported_with_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def unknown(*where: object, **how: object) -> None:
        asked.append(where)
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(store.socket, "getaddrinfo", unknown)
    with pytest.raises(JobError, match=f"rank 1 on host {HOST} cannot resolve 'nohost'.*set MASTER_ADDR") as error:
        connect_store(LaunchEnvironment(1, 2, address="nohost"), SHORT)
    assert error.value.status == 2 and len(asked) > 1


def test_a_first_rank_that_does_not_run() -> None:
    """Torch would add a stack of C++ to it."""
    env, began = LaunchEnvironment(1, 2, port=free_port()), time.monotonic()
    with pytest.raises(JobError, match=f"rank 1 on host {HOST} found no rank 0 at 127.0.0.1:{env.port} within 0.01") as error:
        connect_store(env, SHORT)
    assert error.value.status == 1 and time.monotonic() - began < 30.0


def test_ranks_that_do_not_come() -> None:
    with pytest.raises(JobError, match=r"not all 3 processes connected to 127.0.0.1:.*WORLD_SIZE") as error:
        connect_store(LaunchEnvironment(0, 3, port=free_port()), SHORT)
    assert error.value.status == 1


LOST_STORE = """
import os, signal
from contextlib import suppress
from megatron.launch.entry import loading
with loading():
    from torch.distributed import TCPStore
read, write = os.pipe()
if (server := os.fork()) == 0:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    os.write(write, str(store.port).encode())
    signal.pause()
client = TCPStore("127.0.0.1", int(os.read(read, 10)), is_master=False)
os.kill(server, signal.SIGKILL)
os.waitpid(server, 0)
for _ in range(3):
    try:
        client.get("key")
    except RuntimeError:
        print("lost")
"""


def test_torch_adds_no_lines_where_the_store_is_lost() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TORCH_CPP_LOG_LEVEL"}
    done = subprocess.run([sys.executable, "-c", LOST_STORE], env=environment, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("lost\n" * 3, "")


class LostStore:
    """A connection whose server has ended since."""

    def compare_set(self, *_: object) -> bytes:
        raise RuntimeError("Broken pipe, with a stack of C++")


def test_a_first_rank_that_ends_while_another_joins(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has reported why, so the other one needs no traceback."""
    monkeypatch.setattr(job, "connect_store", lambda *_, **__: LostStore())
    said = f"rank 1 on host {HOST} lost its connection to 127.0.0.1:29500: rank 0 has ended, and its own message states why"
    with pytest.raises(JobError, match=f"^{said}$"), job.guarded(LaunchEnvironment(1, 2, port=29500)):
        pass
