"""One step's gradients to weights: reduce, clip, update and gather, ours beside torch's, on two ranks.

    python benchmarks/optimizer.py [--ranks 2] [--parameters 20] [--width 1024] [--rounds 9] [--steps 3]

The model is a row of matrices and vectors whose loss is a weighted sum of their elements: its backward pass does nothing but
write gradients, so what is measured is what data parallelism and the optimizer add to a backward pass: zeroing, sums over the
ranks and their mean, the norm, clipping, the update, and the weights of the others. All contenders start from the same weights
and see the same gradients; after the timed steps their weights are compared with the first one's. They take turns, round by
round and each time another one first, so that a slow minute of the machine falls on all of them: a figure is the median over
rounds, a ratio the median of the ratios within each round; the ranges are the smallest and the largest. Beside the time on the
wall stands the processor time of the first rank with all its threads, which other work on the machine disturbs less.
Bytes are those of weights, gradients, main weights and moments that one rank keeps, as counted in its tensors.
"""

from __future__ import annotations

import argparse
import multiprocessing as mp
import os
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from megatron.config.schema import OptimConfig
from megatron.launch.malloc import keep_freed_memory
from megatron.mesh.grid import Grid
from megatron.mesh.mesh import Mesh
from megatron.optim.buffers import flat_buffers
from megatron.optim.optimizer import Optimizer
from megatron.parallel.spec import ParameterSpec, Part, describe

LR, DECAY, CLIP = 1e-3, 0.01, 1.0
DDP, ZERO = "torch DDP + AdamW", "torch DDP + ZeroRedundancyOptimizer"
CONTENDERS = {  # name: whom it is compared with
    "ours": DDP,
    "ours, overlapped": DDP,
    "ours, distributed optimizer": ZERO,
    "ours, distributed optimizer, overlapped": ZERO,
    DDP: None,
    ZERO: None,
}


@dataclass(frozen=True)
class Case:
    """The sizes of the benchmark.

    Attributes:
        ranks: processes.
        parameters: matrices `[width, width]`, each with a vector `[width]`.
        width: of the matrices.
        rounds: turns of each contender.
        steps: of a turn.
    """

    ranks: int
    parameters: int
    width: int
    rounds: int
    steps: int


class Row(nn.Module):
    """A row of matrices and vectors, whose loss is a weighted sum of their elements."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.held = nn.ParameterList()
        generator = torch.Generator().manual_seed(1)
        for number in range(case.parameters):
            for kind, shape in (("weight", (case.width, case.width)), ("bias", (case.width,))):
                spec = ParameterSpec(f"{number}.{kind}", shape, Part.whole(shape), decay=kind == "weight")
                self.held.append(describe(nn.Parameter(torch.randn(shape, generator=generator)), spec))

    def forward(self, factor: float) -> Tensor:
        return sum(((p * (factor * (i + 1))).sum() for i, p in enumerate(self.held)), torch.zeros(()))


Step = Callable[[int], object]


def build_ours(model: Row, mesh: Mesh, *, sharded: bool, overlap: bool) -> tuple[Step, Iterator[Tensor]]:
    """Build a step of this framework's optimizer.

    Args:
        model: the parameters.
        mesh: all ranks are data-parallel ones.
        sharded: shard the optimizer's state over them.
        overlap: reduce gradients during the backward pass.

    Returns:
        The step, and the tensors that it keeps.
    """
    buffers = flat_buffers(model.parameters(), 4_000_000, mesh, sharded=sharded)
    config = OptimConfig(clip_grad=CLIP, start_weight_decay=DECAY, end_weight_decay=DECAY)
    optimizer = Optimizer(buffers, config, mesh, overlap_grad_reduce=overlap)

    def step(number: int) -> None:
        optimizer.zero(1)
        model(1.0 + mesh.rank + number).backward()
        optimizer.step(lr=LR, weight_decay=DECAY, scale=1.0 / mesh.dp.size)

    moments = (t for n in range(len(buffers)) for t in optimizer.update.state(n).values())
    return step, iter([*(t for b in buffers for t in (b.weights, b.grads, b.main)), *moments])


def build_torch(model: Row, mesh: Mesh, *, sharded: bool) -> tuple[Step, Iterator[Tensor]]:
    """Build a step of PyTorch's own wrapper and optimizer.

    Args:
        model: the parameters.
        mesh: all ranks are data-parallel ones.
        sharded: shard the optimizer's state over them, by ZeroRedundancyOptimizer.

    Returns:
        The step, and the tensors that it keeps.
    """
    ddp = DistributedDataParallel(model, bucket_cap_mb=16, gradient_as_bucket_view=True)
    decays = [p for p in model.parameters() if p.dim() > 1]
    groups = [
        {"params": decays, "weight_decay": DECAY},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer: torch.optim.Optimizer
    if sharded:
        optimizer = ZeroRedundancyOptimizer(groups, torch.optim.AdamW, lr=LR, fused=True, parameters_as_bucket_view=True)
    else:
        optimizer = torch.optim.AdamW(groups, lr=LR, fused=True)

    def step(number: int) -> None:
        optimizer.zero_grad(set_to_none=False)
        ddp(1.0 + mesh.rank + number).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()

    def kept() -> Iterator[Tensor]:
        inner = optimizer.optim if isinstance(optimizer, ZeroRedundancyOptimizer) else optimizer
        for p in model.parameters():
            yield p
            if p.grad is not None:
                yield p.grad
        yield from (t for state in inner.state.values() for t in state.values() if t.dim())

    return step, kept()


class Contender:
    """A contender, ready to take turns; its first steps are behind it, which make state and count buckets."""

    def __init__(self, name: str, case: Case, mesh: Mesh) -> None:
        self.model, self.done = Row(case), 0
        sharded = "distributed" in name or name == ZERO
        if name.startswith("ours"):
            self.step, kept = build_ours(self.model, mesh, sharded=sharded, overlap="overlapped" in name)
        else:
            self.step, kept = build_torch(self.model, mesh, sharded=sharded)
        self.turn(2)
        self.held = held_bytes(kept)

    def turn(self, steps: int) -> tuple[float, float]:
        """Return the seconds of a step from the first rank's start to the last one's end, and those of this processor."""
        dist.barrier()
        begun = time.perf_counter(), time.process_time()
        for _ in range(steps):
            self.step(self.done)
            self.done += 1
        dist.barrier()
        return (time.perf_counter() - begun[0]) / steps, (time.process_time() - begun[1]) / steps

    def weights(self) -> Tensor:
        """Return all parameters in one vector."""
        return torch.cat([p.detach().flatten() for p in self.model.parameters()])


def held_bytes(kept: Iterator[Tensor]) -> int:
    """Count the bytes of tensors; a slice of one that is counted already takes none of its own."""
    elements = {(t.data_ptr(), t.numel()): t for t in kept}
    storages = {t.untyped_storage().data_ptr(): 0 for t in elements.values()}
    for t in elements.values():
        key = t.untyped_storage().data_ptr()
        storages[key] = min(storages[key] + t.nbytes, t.untyped_storage().nbytes())
    return sum(storages.values())


Times = dict[str, list[tuple[float, float]]]


def take_turns(contenders: dict[str, Contender], case: Case) -> Times:
    """Collect the times that `Contender.turn` reports, for every contender in every round."""
    order: list[str] = list(contenders)
    times: Times = {name: [] for name in contenders}
    for first in range(case.rounds):
        first %= len(order)
        for name in order[first:] + order[:first]:
            times[name].append(contenders[name].turn(case.steps))
    return times


def report(name: str, times: Times, held: int, apart: float) -> Iterator[str]:
    """Yield the lines about a contender.

    Args:
        name: of the contender.
        times: of all contenders.
        held: bytes that it keeps on the first rank.
        apart: largest difference of its weights from the first contender's.
    """
    wall, processor = ([1000 * turn[which] for turn in times[name]] for which in (0, 1))
    yield (
        f"{name:<40} {median(wall):>7.1f} ms, processor {median(processor):>7.1f} ms {held / 2**20:>7.1f} MiB"
        f"   weights differ by {apart:.1e}"
    )
    against = CONTENDERS[name]
    if against is not None:
        pairs = list(zip(times[name], times[against], strict=True))
        speeds = [[theirs[which] / mine[which] for mine, theirs in pairs] for which in (0, 1)]
        shown = [f"{median(values):.2f}x ({min(values):.2f} - {max(values):.2f})" for values in speeds]
        yield f"    the speed of {against}: {shown[0]}; in processor time {shown[1]}"


def run_rank(rank: int, case: Case, port: int) -> None:
    """Measure on one rank; the first one prints the lines.

    Args:
        rank: of this process.
        case: the sizes.
        port: of the ranks' store, on this host.
    """
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(case.ranks))
    torch.set_num_threads(1)
    keep_freed_memory()  # for all of them: what the model's own tensors cost is not the question
    dist.init_process_group("gloo")
    mesh = Mesh.build(Grid(dp=case.ranks), rank)
    contenders = {name: Contender(name, case, mesh) for name in CONTENDERS}
    times = take_turns(contenders, case)
    reference = contenders["ours"].weights()
    for name, contender in contenders.items():
        apart = float((contender.weights() - reference).abs().max())
        if rank == 0:
            print("\n".join(report(name, times, contender.held, apart)), flush=True)
    dist.destroy_process_group()


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("ranks", 2), ("parameters", 20), ("width", 1024), ("rounds", 9), ("steps", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    case = Case(**vars(parser.parse_args()))
    count = case.parameters * (case.width + 1) * case.width
    print(f"{count:,} parameters in fp32 on {case.ranks} ranks; steps from backward pass to weights, {case.rounds} rounds")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = mp.get_context("spawn")
    ranks = [context.Process(target=run_rank, args=(rank, case, port)) for rank in range(case.ranks)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    raise SystemExit(any(process.exitcode for process in ranks))


if __name__ == "__main__":
    main()
