"""A pretraining run whose ranks are forked from this process, and can be killed one by one.

The parent has imported torch already, and the children get the variables that torchrun would set, so a start costs a second
instead of six. Beside what the run writes itself, each rank leaves `samples.RANK` in the run's folder, a line for each
step: how many samples had been consumed, the numbers of those that it trained on, and a checksum of their tokens.
"""

from __future__ import annotations

import json
import mmap
import os
import re
import signal
import socket
import sys
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.cli.program import pretrain
from megatron.data.loader import MicroBatchLoader
from megatron.train import pretraining  # noqa: F401 - so that the children need not import it
from megatron.train.hooks.evaluate import HeldOut

TRAINED = re.compile(r"\] iteration +(\d+)/")


@dataclass(frozen=True)
class Case:
    """One command: the flags of pretrain_gpt.py, without --save. layout, saving: its name."""

    layout: str
    saving: str
    ranks: int
    flags: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.layout}, {self.saving}"


def train_as(rank: int, case: Case, port: int, folder: Path, log: Path, evaluating: mmap.mmap) -> int:
    """Become a rank, in a forked child; record the samples that it reads, and mark when it evaluates.

    Args:
        rank: that the child becomes.
        case: the run's command.
        port: of the ranks' store, on this host.
        folder: of the run; its `save` holds the checkpoints, its `samples.RANK` what was read.
        log: that the rank's output is appended to.
        evaluating: a byte for each rank, 1 while it evaluates.

    Returns:
        The run's exit status.
    """
    output = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    if case.ranks > 1:
        place = {"RANK": rank, "WORLD_SIZE": case.ranks, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": case.ranks}
        os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    read = os.open(folder / f"samples.{rank}", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    evaluate, next_batches = HeldOut.evaluate, MicroBatchLoader.next_batches

    def marked(*args: Any, **more: Any) -> Any:
        evaluating[rank] = 1
        result = evaluate(*args, **more)
        evaluating[rank] = 0
        return result

    def recorded(loader: MicroBatchLoader, size: int) -> Any:
        consumed, batches = loader.consumed, next_batches(loader, size)
        if loader.name == "training":
            numbers = [int(n) for batch in batches for n in batch.samples]
            tokens = zlib.crc32(b"".join(batch.tokens.numpy().tobytes() for batch in batches))
            os.write(read, (json.dumps([consumed, numbers, tokens]) + "\n").encode())
        return batches

    HeldOut.evaluate, MicroBatchLoader.next_batches = marked, recorded
    return pretrain([*case.flags, "--save", str(folder / "save"), "--auto-resume"], program="chaos.py", defaults={})


class Attempt:
    """The processes of one start, until each has ended. statuses: rank -> exit status, negative after a signal."""

    def __init__(self, case: Case, folder: Path) -> None:
        self.folder, self.log = folder, folder / f"log.{len(list(folder.glob('log.*')))}"
        self.statuses: dict[int, int] = {}
        self._evaluating = mmap.mmap(-1, case.ranks)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        (folder / "save").mkdir(parents=True, exist_ok=True)
        self.log.touch()
        sys.stdout.flush()
        self.pids = [self._fork(rank, case, port) for rank in range(case.ranks)]

    def _fork(self, rank: int, case: Case, port: int) -> int:
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                status = train_as(rank, case, port, self.folder, self.log, self._evaluating)
            except SystemExit as leaving:
                status = leaving.code if isinstance(leaving.code, int) else 1
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        return pid

    def running(self) -> bool:
        """Return whether any rank is alive."""
        for rank, pid in enumerate(self.pids):
            if rank not in self.statuses:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    self.statuses[rank] = os.waitstatus_to_exitcode(status)
        return len(self.statuses) < len(self.pids)

    def kill(self, ranks: Sequence[int]) -> None:
        """Kill these ranks.

        Before they train, ranks may not know one another yet: then the rest is told to end, as torchrun does.
        """
        rest = [rank for rank in range(len(self.pids)) if rank not in ranks] if self.reached() < 0 else []
        for rank, number in [(r, signal.SIGKILL) for r in ranks] + [(r, signal.SIGTERM) for r in rest]:
            if rank not in self.statuses:
                os.kill(self.pids[rank], number)

    def wait(self, seconds: float) -> float:
        """Wait until all ranks have ended, and return the seconds it took.

        Raises:
            RuntimeError: some were alive after so many seconds; they are killed.
        """
        began = time.monotonic()
        while self.running():
            if time.monotonic() - began > seconds:
                left = [rank for rank in range(len(self.pids)) if rank not in self.statuses]
                self.kill(left)
                raise RuntimeError(f"ranks {left} are still there after {seconds:.0f} s: see {self.log}")
            time.sleep(0.005)
        return time.monotonic() - began

    def text(self) -> str:
        """Return what the start has printed so far."""
        return self.log.read_text(errors="replace")

    def reached(self) -> int:
        """Return the last iteration that this start has trained; -1 before its first."""
        return max((int(n) for n in TRAINED.findall(self.text())), default=-1)

    def phase(self) -> str:
        """Return the phase in which the run was killed."""
        if any(path.name.endswith(".tmp") for path in (self.folder / "save").iterdir()):
            return "saving"
        if any(self._evaluating[:]):
            return "evaluation"
        return "training" if self.reached() >= 0 else "start"
