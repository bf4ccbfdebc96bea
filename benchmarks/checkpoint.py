"""Measure a checkpoint: the stall of a step with --async-save and without, and the bandwidth beside dd's to the same disk.

    python benchmarks/checkpoint.py [--directory .] [--ranks 2] [--layers 6] [--width 768] [--rounds 5]

A GPT with AdamW, fp32, random tokens. In every round, on all ranks at once:

  steps     with no save under way
  save      in the foreground: all of it is stall
  dd        of the same bytes: each rank copies such a shard from memory, with bs=16M conv=fsync; first in every other round
  async     in the background: the stall of `save`, then steps until the checkpoint is on disk

What was written is deleted and the disk is synced between the parts. Ratios are medians of the ratios within a round; the
slowest rank counts. Bytes handed to collectives during a save are counted on every rank.
"""

from __future__ import annotations

import argparse
import multiprocessing as mp
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from cases import Case, Dims
from ours import build_config, micro_batches_from_text

from megatron.checkpoint.save_plan import shard_name
from megatron.config.schema import CheckpointConfig
from megatron.launch.environment import LaunchEnvironment
from megatron.launch.job import job
from megatron.train.run import Run, build_run
from megatron.train.saving import Saver

COLLECTIVES = ("all_gather", "gather", "scatter", "broadcast", "all_reduce")


@dataclass(frozen=True)
class Round:
    """Seconds, of the slowest rank. step, step_meanwhile: of one step, without a save and while one is written."""

    step: float
    foreground: float
    dd: float
    stall: float
    until_on_disk: float
    step_meanwhile: float


@contextmanager
def counted_collectives() -> Iterator[list[int]]:
    """Collect the bytes of the tensors that this process hands to collectives meanwhile."""
    sizes: list[int] = []
    module: Any = dist.distributed_c10d
    originals = {name: getattr(module, name) for name in COLLECTIVES}

    def counting(work: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            for value in args:
                sizes.extend(t.nbytes for t in (value if isinstance(value, list) else [value]) if isinstance(t, torch.Tensor))
            return work(*args, **more)

        return call

    for name, work in originals.items():
        setattr(module, name, counting(work))
        setattr(dist, name, getattr(module, name))
    try:
        yield sizes
    finally:
        for name, work in originals.items():
            setattr(module, name, work)
            setattr(dist, name, work)


def slowest(seconds: float) -> float:
    """Return the longest of the ranks' times, after which all go on together."""
    value = torch.tensor(seconds, dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(value, dist.ReduceOp.MAX)
    return value.item()


def timed(work: Callable[[], object]) -> float:
    """Return the seconds that the slowest rank takes for some work."""
    slowest(0.0)  # all begin together
    began = time.perf_counter()
    work()
    return slowest(time.perf_counter() - began)


class Bench:
    """The measurements of one rank."""

    def __init__(self, case: Case, run: Run, root: Path) -> None:
        self.run, self.root, self.rank = run, root, run.mesh.rank
        dims = case.dims
        tokens = torch.randint(dims.vocab, (dims.micro_batch * case.micro_batches, dims.seq + 1))
        self.batches = micro_batches_from_text(case, tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
        self.savers = {}
        for name, behind in (("foreground", False), ("async", True)):
            config = CheckpointConfig(save=str(root / name), async_save=behind)
            run.config = replace(run.config, checkpoint=config)
            self.savers[name] = Saver(run, {}, lambda line: None)

    def step(self) -> None:
        self.run.step(self.batches, self.run.state)
        self.run.state.iteration += 1

    def clear(self) -> None:
        """Wait for every save, and remove what was written."""
        for saver in self.savers.values():
            saver.finish()
        slowest(0.0)
        if self.rank == 0:
            for path in self.root.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
            os.sync()
        slowest(0.0)

    def dd(self) -> float:
        """Return the seconds of a copy on this disk, which is deleted again."""
        copy = self.root / f"copy{self.rank}"
        command = ["dd", f"if={self.root / f'source{self.rank}'}", f"of={copy}", "bs=16M", "conv=fsync"]
        seconds = timed(lambda: subprocess.run(command, check=True, capture_output=True))
        copy.unlink()
        self.clear()
        return seconds

    def foreground(self) -> float:
        """Return the seconds of a save for which the run waits."""
        seconds = timed(self.savers["foreground"].save)
        self.clear()
        return seconds

    def one_round(self, steps: int, dd_first: bool) -> Round:
        """Measure each way of saving once.

        Args:
            steps: that are timed without a save.
            dd_first: copy a file before the first save, not after it.
        """
        step = timed(lambda: [self.step() for _ in range(steps)]) / steps
        dd = self.dd() if dd_first else 0.0
        foreground = self.foreground()
        dd = dd or self.dd()
        saver = self.savers["async"]
        saver.seconds = 0.0
        stall = timed(saver.save)
        count, began = 0, time.perf_counter()
        while slowest(float(saver._saving is not None and not saver._saving.reported)):
            self.step()
            saver.check()
            count += 1
        meanwhile = (time.perf_counter() - began) / max(count, 1)
        self.clear()
        return Round(step, foreground, dd, stall, slowest(saver.seconds), slowest(meanwhile))

    def traffic(self) -> tuple[int, int]:
        """Return the bytes that this rank hands to collectives in a save, and those that it writes."""
        with counted_collectives() as sizes:
            self.savers["foreground"].save()
        held = self.root / "foreground" / f"iter_{self.run.state.iteration:07d}" / shard_name(self.rank)
        size = held.stat().st_size
        slowest(0.0)
        held.replace(self.root / f"source{self.rank}")  # for dd
        self.clear()
        return sum(sizes), size


def spread(values: list[float], form: str = ".2f") -> str:
    """Return median, minimum and maximum in words."""
    return f"{median(values):{form}} ({min(values):{form}} - {max(values):{form}})"


def report(rounds: list[Round], size: int) -> None:
    """Print the figures of all rounds. size: bytes of a checkpoint."""
    mb = size / 1e6
    print(f"{'step':<34} {spread([1000 * r.step for r in rounds], '.0f')} ms")
    print(f"{'save in the foreground':<34} {spread([mb / r.foreground for r in rounds], '.0f')} MB/s of all ranks")
    print(f"{'dd':<34} {spread([mb / r.dd for r in rounds], '.0f')} MB/s of all ranks")
    print(f"{'bandwidth, ours / dd':<34} {spread([r.dd / r.foreground for r in rounds])}")
    print(f"{'stall in the foreground':<34} {spread([r.foreground / r.step for r in rounds])} steps")
    print(f"{'stall with --async-save':<34} {spread([r.stall / r.step for r in rounds], '.3f')} steps")
    print(f"{'stall, foreground / --async-save':<34} {spread([r.foreground / r.stall for r in rounds], '.0f')}")
    print(f"{'until it is on disk, async':<34} {spread([r.until_on_disk for r in rounds])} s")
    print(f"{'step meanwhile / step':<34} {spread([r.step_meanwhile / r.step for r in rounds])}")


def run_rank(rank: int, case: Case, root: Path, port: int, rounds: int) -> None:
    """Measure on one rank; the first one prints the table.

    Args:
        rank: of this process.
        case: model and layout.
        root: a directory on the disk that is measured, for all ranks.
        port: of the ranks' store, on this host.
        rounds: that are measured, after one that is not.
    """
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(case.ranks))
    os.environ.update(LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(case.ranks))
    with job(LaunchEnvironment.from_environ(os.environ), "gloo" if case.ranks > 1 else None) as started:
        torch.set_num_threads(case.threads)
        bench = Bench(case, build_run(build_config(case), started), root)
        bench.step()
        traffic, size = bench.traffic()  # the first save plans, and tells who holds what
        again, _ = bench.traffic()
        bench.one_round(1, dd_first=True)
        measured = [bench.one_round(case.steps, dd_first=bool(number % 2)) for number in range(rounds)]
        total = int(slowest(size)) * case.ranks
        if rank == 0:
            print(f"{total / 1e6:.0f} MB on {case.ranks} ranks, {rounds} rounds of {case.steps} steps")
            report(measured, total)
            print(f"bytes handed to collectives by the first rank: {traffic} in the first save, {again} in a later one")


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", default=".", help="on the disk that is measured")
    for name, default in (("ranks", 2), ("layers", 6), ("width", 768), ("sequence", 256), ("rounds", 5), ("steps", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    heads = max(1, given.width // 64)
    dims = Dims(layers=given.layers, width=given.width, heads=heads, seq=given.sequence, vocab=8192, micro_batch=2)
    case = Case("a GPT in data parallel", dims, (), dp=given.ranks, steps=given.steps)
    root = Path(tempfile.mkdtemp(prefix="checkpoint-bench-", dir=given.directory))
    try:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        context = mp.get_context("spawn")
        ranks = [context.Process(target=run_rank, args=(rank, case, root, port, given.rounds)) for rank in range(given.ranks)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        failed = any(process.exitcode for process in ranks)
    finally:
        shutil.rmtree(root)
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
