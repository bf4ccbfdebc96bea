"""Devices and backends of the ranks: each sees for itself, and where they differ all end with the same words."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron.launch.device import (
    DeviceChoice,
    Hardware,
    agree_on_devices,
    choose_rank_device,
    describe_ranks,
    device_and_backend,
    device_conflict,
)
from megatron.launch.environment import LaunchEnvironment
from megatron.launch.errors import JobError
from megatron.launch.job import Guard, job
from megatron.mesh.grid import Grid
from megatron.mesh.mesh import Mesh, naming_communicator

ROOT = Path(__file__).parents[2]
PROGRAM = Path(__file__).parent / "watched_job.py"
GPU, CPU = DeviceChoice("a", "cuda", "nccl", "it has 4 GPU(s)"), DeviceChoice("b", "cpu", "gloo", "it has no GPU: no driver")


def test_device_and_backend_follow_from_the_gpus():
    assert device_and_backend(LaunchEnvironment(), None, 0) == (torch.device("cpu"), "gloo")
    assert device_and_backend(LaunchEnvironment(3, 4, 3, 4), None, 4) == (torch.device("cuda", 3), "nccl")
    assert device_and_backend(LaunchEnvironment(3, 4, 3, 4), None, 1) == (torch.device("cuda", 0), "gloo")
    assert device_and_backend(LaunchEnvironment(1, 2, 1, 2), "gloo", 2) == (torch.device("cuda", 1), "gloo")
    with pytest.raises(ValueError, match="needs one GPU per process; this host has 0 for 2"):
        device_and_backend(LaunchEnvironment(1, 2, 1, 2), "nccl", 0)


def test_a_rank_chooses_its_device_with_a_reason():
    """Fewer GPUs than processes mean gloo, but for the one GPU that SLURM shows each task; nccl that cannot be is a problem."""
    device, choice = choose_rank_device(LaunchEnvironment(5, 8, 1, 4, "torchrun"), None, Hardware(2))
    assert device == torch.device("cuda", 1) and (choice.device, choice.backend, choice.gpu_uuid) == ("cuda", "gloo", "")
    assert choice.why == "it has 2 GPU(s) for 4 process(es)"
    device, choice = choose_rank_device(LaunchEnvironment(5, 8, 1, 4, "srun"), None, Hardware(1, gpu_uuid="GPU-7"))
    assert device == torch.device("cuda", 0) and (choice.backend, choice.gpu_uuid) == ("nccl", "GPU-7")
    assert (
        choose_rank_device(LaunchEnvironment(5, 8, 1, 4, "srun"), "gloo", Hardware(1, gpu_uuid="GPU-7"))[1].gpu_uuid == ""
    )  # which may be shared
    device, choice = choose_rank_device(LaunchEnvironment(1, 2, 1, 2), "nccl", Hardware(0, "no driver"))
    assert device.type == "cpu" and "needs one GPU per process" in choice.problem and choice.why == "it has no GPU: no driver"
    assert Hardware.detect().gpus or Hardware.detect().why


def test_hosts_that_differ_are_named():
    assert device_conflict([GPU, GPU]) is device_conflict([CPU] * 3) is None
    mixed = device_conflict([GPU, GPU, CPU, GPU]) or ""
    assert mixed.startswith(
        "the hosts of this job differ: host a (ranks 0, 1, 3) would use cuda and nccl, since it has 4 GPU(s); "
        "host b (rank 2) would use cpu and gloo, since it has no GPU: no driver. Repair"
    )
    few = DeviceChoice("c", "cuda", "gloo", "it has 2 GPU(s) for 4 process(es)")
    assert "host c (rank 1) would use cuda and gloo" in (device_conflict([GPU, few]) or "")
    told = DeviceChoice("b", "cpu", "nccl", problem="--distributed-backend nccl needs one GPU per process")
    assert device_conflict([GPU, told]) == "host b (rank 1): --distributed-backend nccl needs one GPU per process"
    one = DeviceChoice("a", "cuda", "nccl", gpu_uuid="GPU-7")
    assert (
        device_conflict(
            [one, DeviceChoice("a", "cuda", "nccl", gpu_uuid="GPU-8"), DeviceChoice("b", "cuda", "nccl", gpu_uuid="GPU-7")]
        )
        is None
    )
    assert (device_conflict([one, one]) or "").startswith("ranks 0, 1 on host a share one GPU")


def test_the_odd_host_comes_first_and_many_are_counted():
    many = [DeviceChoice(f"n{host}", "cuda", "nccl", "it has 8 GPU(s)") for host in range(100) for _ in range(8)]
    text = device_conflict([*many, CPU]) or ""
    assert text.index("host b (rank 800)") < text.index("host n0 (ranks 0 to 7), n1 (ranks 8 to 15)")
    assert "n3 (ranks 24 to 31) and 96 more" in text and "n4" not in text
    assert [describe_ranks(r) for r in ([3], [0, 1], [2, 4, 6], list(range(0, 99, 3)))] == [
        "rank 3",
        "ranks 0, 1",
        "ranks 2, 4, 6",
        "33 ranks from 0 to 96",
    ]


def agree_as_threads(said: list[DeviceChoice | None], seconds: float = 20.0) -> list[tuple[int, str] | None]:
    """Run `agree_on_devices` on each rank, as threads over one store; return how each ended, None for an absent rank."""
    store, ends = dist.HashStore(), [None] * len(said)

    def run_rank(rank: int, choice: DeviceChoice) -> None:
        try:
            agree_on_devices(store, LaunchEnvironment(rank, len(said)), choice, timedelta(seconds=seconds))
            ends[rank] = (0, "")
        except JobError as error:
            ends[rank] = (error.status, str(error))

    threads = [threading.Thread(target=run_rank, args=(r, m)) for r, m in enumerate(said) if m is not None]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return ends


def test_all_ranks_end_with_the_same_conflict():
    assert agree_as_threads([GPU, GPU, GPU]) == [(0, "")] * 3
    ends = agree_as_threads([GPU, CPU, GPU])
    assert ends == [(2, device_conflict([GPU, CPU, GPU]))] * 3


def test_a_rank_that_does_not_come_is_named():
    (end,) = agree_as_threads([GPU, None, None], 0.6)[:1]
    assert end is not None and end == (1, "ranks 1, 2 did not join the job within 0.01 minutes")


def test_one_process_that_cannot_do_as_told():
    expected = pytest.raises(JobError, match="nccl needs one GPU per process; this host has 0 for 1")
    with expected as caught, job(LaunchEnvironment(), "nccl", detect=lambda: Hardware(0, "no driver")):
        pass
    assert caught.value.status == 2


def test_nccl_lets_the_watch_speak_first(monkeypatch):
    """NCCL's watchdog aborts the process at its timeout: a minute after the watch has said what hangs."""
    given, store = {}, dist.HashStore()
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **settings: given.update(settings, backend=backend))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: given.update(device=device))
    store.set("device 1", json.dumps(asdict(GPU)))
    guard = Guard(store=store, world_size=2, timeout=timedelta(minutes=3))
    with job(LaunchEnvironment(0, 2, 0, 2), guard=guard, detect=lambda: Hardware(2)) as started:
        assert given["backend"] == "nccl" and given["device"] == torch.device("cuda", 0)
        assert started.timeout == given["timeout"] == timedelta(minutes=4)


@pytest.mark.parametrize("launcher", ["srun", "torchrun"])
def test_a_dead_driver_ends_the_job_with_one_message(launcher, tmp_path):
    """Rank 1 sees no GPU, the others four: nothing hangs, nobody touches a GPU, and all exit with 2."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    way = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if launcher == "torchrun" else []
    ended = subprocess.run(
        [sys.executable, *way, str(PROGRAM), "dead-driver", str(tmp_path)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: the hosts of this job differ: ")
    assert "(rank 1) would use cpu and gloo, since it has no GPU: its driver is dead" in line
    assert "would use cuda and nccl, since it has 4 GPU(s)" in line
    if launcher == "srun":
        assert ended.stdout.split() == ["2", "2", "2"]
    else:
        assert ended.returncode == 1 and "exitcode  : 2" in ended.stderr


class FailingCollectives:
    """A process group's collectives, of which one fails."""

    def __init__(self, monkeypatch, fails: tuple[int, ...]) -> None:
        self.groups: list[tuple[int, ...]] = []
        self.opened: list[tuple[int, ...]] = []
        self.fails = fails
        monkeypatch.setattr(dist, "new_group", lambda ranks, timeout: self.groups.append(tuple(ranks)) or tuple(ranks))
        monkeypatch.setattr(dist, "get_backend", lambda group: "gloo")
        monkeypatch.setattr(dist, "all_reduce", self.all_reduce)

    def all_reduce(self, token: torch.Tensor, group: tuple[int, ...]) -> None:
        if group == self.fails:
            raise RuntimeError("Connection closed by peer\n[127.0.0.1]")
        self.opened.append(group)


def test_every_group_is_opened_in_one_order(monkeypatch):
    """Each rank opens its own groups in the order in which all were made, so none waits for one that waits for it."""
    orders = []
    for rank in range(16):
        groups = FailingCollectives(monkeypatch, ())
        mesh = Mesh.build(Grid(pp=4, dp=2, tp=2), rank, shared_memory=False)
        orders.append(groups.opened)
        assert groups.opened == [g for g in dict.fromkeys(groups.groups) if g in groups.opened]
        used = (mesh.tp, mesh.dp, mesh.pp, mesh.dp_cp, mesh.world, mesh.embedding)
        assert set(groups.opened) == {axis.ranks for axis in used if axis.size > 1}
        assert len(groups.opened) == len(set(groups.opened))
    for group in {group for order in orders for group in order}:
        assert [rank for rank in range(16) if group in orders[rank]] == list(group)


def test_a_group_that_does_not_open_is_named(monkeypatch):
    FailingCollectives(monkeypatch, (2, 3))
    with pytest.raises(JobError, match=r"^rank 3 cannot open the communicator tp of ranks 2, 3: Connection closed by peer \["):
        Mesh.build(Grid(dp=2, tp=2), 3)
    named = pytest.raises(JobError, match="rank 1 cannot open the communicator pp_back of ranks 1, 0: gone")
    with named, naming_communicator("pp_back", (1, 0), 1):
        raise RuntimeError("gone")
