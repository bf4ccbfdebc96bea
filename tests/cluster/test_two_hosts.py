"""Two hosts joined by a cable that is cut in the middle of training: both sides end, and the run goes on later."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ITERATIONS, CUT_AFTER = 200, 60
FLAGS = f"--pipeline-model-parallel-size 2 --train-iters {ITERATIONS} --save-interval 25 --eval-interval 80".split()


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


class TwoHosts:
    """Two network namespaces joined by a virtual cable. What runs there has a host name and process numbers of its own."""

    def __init__(self) -> None:
        self.names = [f"host{i}-{os.getpid()}" for i in (1, 2)]

    def build(self) -> None:
        for name in self.names:
            ip("netns", "add", name)
        first, second = self.names
        ip("link", "add", "cable1", "netns", first, "type", "veth", "peer", "name", "cable2", "netns", second)
        for i, name in enumerate(self.names, start=1):
            ip("-n", name, "addr", "add", f"10.77.0.{i}/24", "dev", f"cable{i}")
            ip("-n", name, "link", "set", f"cable{i}", "up")
            ip("-n", name, "link", "set", "lo", "up")

    def cable(self, state: str) -> None:
        """Up or down; the far end loses its carrier as well."""
        ip("-n", self.names[1], "link", "set", "cable2", state)

    def torchrun(self, number: int, log: Path, *command: str) -> subprocess.Popen[bytes]:
        name = self.names[number]
        # A process namespace, so that no host can look up the other's processes; its end ends all that ran in it.
        inside = ["unshare", "--uts", "--pid", "--fork", "--mount-proc", "--kill-child", "sh", "-c"]
        inside += ['hostname "$0" && exec "$@"', name, sys.executable, "-m", "torch.distributed.run"]
        inside += ["--nnodes", "2", "--node-rank", str(number), "--nproc-per-node", "1", "--master-addr", "10.77.0.1"]
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": f"cable{number + 1}", "OMP_NUM_THREADS": "1"}
        with log.open("wb") as out:
            return subprocess.Popen(
                ["ip", "netns", "exec", name, *inside, *command], cwd=ROOT, env=environment, stdout=out, stderr=out
            )

    def remove(self) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


@pytest.fixture
def hosts() -> Iterator[TwoHosts]:
    made = TwoHosts()
    try:
        made.build()
        made.cable("up")
        subprocess.run(["ip", "netns", "exec", made.names[0], "unshare", "--pid", "--fork", "--mount-proc", "true"], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        made.remove()
        pytest.skip(f"needs root, `ip netns` and `unshare`: {error}")
    yield made
    made.remove()


def test_the_cable_is_cut(hosts, alone, tiny, lines, tmp_path):
    """Cut between two ranks of a pipeline; both name the other's host. Joined again, the run goes on bit for bit."""
    save = tmp_path / "save"
    command = ["pretrain_gpt.py", *tiny, *FLAGS, "--save", str(save), "--auto-resume"]
    jobs: list[subprocess.Popen[bytes]] = []
    try:
        logs = [tmp_path / f"cut{i}.log" for i in (0, 1)]
        jobs = [hosts.torchrun(i, log, *command) for i, log in enumerate(logs)]
        deadline = time.monotonic() + 60.0
        while lines.iteration(save) < CUT_AFTER:
            assert time.monotonic() < deadline and all(job.poll() is None for job in jobs), logs[0].read_text()[-3000:]
            time.sleep(0.02)
        hosts.cable("down")
        cut = time.monotonic()
        reference, expected = alone("pretrain_gpt.py", *tiny, *FLAGS)
        statuses = [job.wait(timeout=max(0.0, cut + 40.0 - time.monotonic())) for job in jobs]
        assert statuses == [1, 1]
        assert lines.iteration(save) < ITERATIONS, "it was over before the cable was cut"
        for i, log in enumerate(logs):
            (error,) = re.findall(r"^error: .*", log.read_text(), re.MULTILINE)
            assert ("lost the connection" in error or "unreachable" in error) and f"on host {hosts.names[1 - i]}" in error, (
                error
            )
        hosts.cable("up")
        logs = [tmp_path / f"again{i}.log" for i in (0, 1)]
        jobs = [hosts.torchrun(i, log, *command) for i, log in enumerate(logs)]
        assert [job.wait(timeout=90.0) for job in jobs] == [0, 0], logs[0].read_text()[-3000:]
        assert re.search(r"loading checkpoint \S+iter_00000(50|75)\b", logs[0].read_text())
        assert reference.wait(timeout=90.0) == 0
    finally:
        for job in jobs:
            job.kill()
            job.wait()
    assert lines.read(save) == lines.read(expected)
    assert [line["iteration"] for line in lines.read(save) if "grad_norm" in line] == list(range(1, ITERATIONS + 1))
