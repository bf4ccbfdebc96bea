"""One step's gradients to weights: reduce, clip, update and gather, ours beside torch's, on two ranks.

    python benchmarks/optimizer.py [--ranks 2] [--parameters 20] [--width 1024] [--steps 10]

The model is a row of matrices and vectors whose loss is a weighted sum of their elements: its backward pass does nothing but
write gradients, so what is measured is what data parallelism and the optimizer add to a backward pass. All contenders start
from the same weights and see the same gradients; after the timed steps their weights are compared with the first one's.
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
from megatron.mesh.grid import Grid
from megatron.mesh.mesh import Mesh
from megatron.optim.buffers import flat_buffers
from megatron.optim.optimizer import Optimizer
from megatron.parallel.spec import ParamSpec, Part, describe

LR, DECAY, CLIP = 1e-3, 0.01, 1.0
CONTENDERS = (
    "ours",
    "ours, overlapped",
    "ours, distributed optimizer",
    "ours, distributed optimizer, overlapped",
    "torch DDP + AdamW",
    "torch DDP + ZeroRedundancyOptimizer",
)


@dataclass(frozen=True)
class Case:
    """ranks: processes. parameters: matrices `[width, width]`, each with a vector `[width]`. steps: timed ones."""

    ranks: int
    parameters: int
    width: int
    steps: int


class Row(nn.Module):
    """The model."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.held = nn.ParameterList()
        generator = torch.Generator().manual_seed(1)
        for number in range(case.parameters):
            for kind, shape in (("weight", (case.width, case.width)), ("bias", (case.width,))):
                spec = ParamSpec(f"{number}.{kind}", shape, Part.whole(shape), decay=kind == "weight")
                self.held.append(describe(nn.Parameter(torch.randn(shape, generator=generator)), spec))

    def forward(self, factor: float) -> Tensor:
        return sum(((p * (factor * (i + 1))).sum() for i, p in enumerate(self.held)), torch.zeros(()))


Step = Callable[[int], object]


def ours(model: Row, mesh: Mesh, *, sharded: bool, overlap: bool) -> tuple[Step, Iterator[Tensor]]:
    buffers = flat_buffers(list(model.parameters()), 4_000_000, mesh.dp_cp if sharded else None)
    optimizer = Optimizer(buffers, OptimConfig(clip_grad=CLIP), mesh, overlap_grad_reduce=overlap)

    def step(number: int) -> None:
        optimizer.zero(1)
        model(1.0 + mesh.rank + number).backward()
        optimizer.step(lr=LR, weight_decay=DECAY, scale=1.0 / mesh.dp.size)

    moments = (t for n in range(len(buffers)) for t in optimizer.update.state(n).values())
    return step, iter([*(t for b in buffers for t in (b.weights, b.grads, b.main)), *moments])


def torchs(model: Row, mesh: Mesh, *, sharded: bool) -> tuple[Step, Iterator[Tensor]]:
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


def contend(name: str, case: Case, mesh: Mesh) -> tuple[float, int, Tensor]:
    """Median seconds of a step, bytes this rank keeps, and the weights after the last step."""
    model = Row(case)
    sharded = "distributed" in name or "Redundancy" in name
    if name.startswith("ours"):
        step, kept = ours(model, mesh, sharded=sharded, overlap="overlapped" in name)
    else:
        step, kept = torchs(model, mesh, sharded=sharded)
    for number in range(2):  # state is made and buckets are counted in the first steps
        step(number)
    times = []
    for number in range(2, 2 + case.steps):
        dist.barrier()
        begun = time.perf_counter()
        step(number)
        dist.barrier()
        times.append(time.perf_counter() - begun)
    elements = {(t.data_ptr(), t.numel()): t for t in kept}
    storages = {t.untyped_storage().data_ptr(): 0 for t in elements.values()}
    for t in elements.values():  # a slice of a tensor that is counted already takes no bytes of its own
        key = t.untyped_storage().data_ptr()
        storages[key] = min(storages[key] + t.nbytes, t.untyped_storage().nbytes())
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    return median(times), sum(storages.values()), weights


def run(rank: int, case: Case, port: int) -> None:
    """One rank's part."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(case.ranks))
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh = Mesh.build(Grid(dp=case.ranks), rank)
    reference = None
    for name in CONTENDERS:
        seconds, held, weights = contend(name, case, mesh)
        reference = weights if reference is None else reference
        apart = float((weights - reference).abs().max())
        if rank == 0:
            print(f"{name:<42} {1000 * seconds:>9.1f} ms {held / 2**20:>9.1f} MiB   weights differ by {apart:.1e}", flush=True)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("ranks", 2), ("parameters", 20), ("width", 1024), ("steps", 10)):
        parser.add_argument(f"--{name}", type=int, default=default)
    case = Case(**vars(parser.parse_args()))
    count = case.parameters * (case.width + 1) * case.width
    print(f"{count:,} parameters in fp32 on {case.ranks} ranks, median of {case.steps} steps from backward pass to weights")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = mp.get_context("spawn")
    ranks = [context.Process(target=run, args=(rank, case, port)) for rank in range(case.ranks)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    raise SystemExit(any(process.exitcode for process in ranks))


if __name__ == "__main__":
    main()
