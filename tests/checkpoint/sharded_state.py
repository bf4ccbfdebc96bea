"""A small state that is split like a model and its optimizer, for the tests to save and load."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.mesh.grid import Grid
from megatron.mesh.mesh import Mesh
from megatron.parallel.spec import Part, Shard

VOCAB = 127  # prime, and short enough that with tp 4 and blocks of 64 two ranks hold padding alone

# name -> whole shape, the dimension cut over tp (None: equal on all ranks), type
TENSORS: dict[str, tuple[tuple[int, ...], int | None, torch.dtype]] = {
    "embedding.word.weight": ((VOCAB, 12), 0, torch.float32),
    "layers.0.attention.qkv.weight": ((48, 12), 0, torch.bfloat16),
    "layers.0.attention.dense.weight": ((12, 16), 1, torch.float32),
    "layers.0.mlp_norm.weight": ((12,), None, torch.float32),
    "steps": ((), None, torch.int64),
}


def tensor_by_name(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Make the tensor that `name` stands for, the same everywhere.

    Args:
        name: seeds its numbers.
        shape: of the whole tensor.
        dtype: that the numbers are rounded to.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return (torch.randn(shape, generator=generator) * 100).to(dtype)


class ShardedState:
    """One rank's rectangles of TENSORS. `filled` as they are to be saved; else zeros, to be loaded."""

    def __init__(self, tp: int, rank: int, *, prefix: str = "", filled: bool = True, tensors: Any = None) -> None:
        self.held: list[Shard] = []
        self.given: dict[str, Any] = {"iteration": 7, "prefix": prefix} if filled else {}
        for name, (shape, dim, dtype) in (tensors or TENSORS).items():
            whole = tensor_by_name(prefix + name, shape, dtype)
            start, size = [0] * len(shape), list(shape)
            if dim is not None:
                block = 64 if name == "embedding.word.weight" else shape[dim] // tp
                block = block if tp > 1 else shape[dim]
                start[dim] = min(rank * block, shape[dim])
                size[dim] = min(block, shape[dim] - start[dim])
            part = Part(tuple(start), tuple(size))
            data = whole[part.slices].clone()
            self.held.append(
                Shard(prefix + name, shape, part, frozenset({"tp"} if dim is not None else ()), data if filled else data * 0)
            )

    def shards(self) -> Iterator[Shard]:
        yield from self.held

    def scalars(self) -> dict[str, Any]:
        return self.given

    def load_scalars(self, values: Mapping[str, Any]) -> None:
        self.given = dict(values)

    def check(self) -> None:
        """Assert that every rectangle holds what the whole has there, bit for bit."""
        for shard in self.held:
            want = tensor_by_name(shard.name, shard.shape, shard.dtype)[shard.part.slices]
            assert torch.equal(shard.data, want), shard.name


def build_state(tp: int, rank: int, *, filled: bool = True) -> dict[str, ShardedState]:
    return {
        "model": ShardedState(tp, rank, filled=filled),
        "optimizer": ShardedState(tp, rank, prefix="exp_avg.", filled=filled),
    }


def build_mesh(tp: int, dp: int) -> Mesh:
    """Build this process's mesh; without torch.distributed the first rank of a grid of one."""
    import torch.distributed as dist

    rank = dist.get_rank() if dist.is_initialized() else 0
    return Mesh.build(Grid(dp=dp, tp=tp), rank)


def save_on_ranks(root: str, iteration: int, tp: int, dp: int) -> str:
    """Save the state; called on every rank of tp x dp.

    Args:
        root: the directory of checkpoints.
        iteration: of the checkpoint.
        tp: ranks over which the state is split.
        dp: ranks that hold the same.
    """
    from megatron.checkpoint.save import save

    mesh = build_mesh(tp, dp)
    config = {"layout": {"tp": tp}}
    return str(save(Path(root), iteration, build_state(tp, mesh.tp.rank), mesh, config=config, assets={"vocab.json": b"{}"}))


def load_and_compare(directory: str, tp: int, dp: int) -> int:
    """Load a checkpoint and compare everything; called on every rank of tp x dp.

    Args:
        directory: of the checkpoint.
        tp: ranks over which the state is split.
        dp: ranks that hold the same.

    Returns:
        The iteration.
    """
    from megatron.checkpoint.load import load

    mesh = build_mesh(tp, dp)
    parts = build_state(tp, mesh.tp.rank, filled=False)
    loaded = load(Path(directory), parts, mesh)
    for prefix, part in parts.items():
        part.check()
        assert part.given == {"iteration": 7, "prefix": "" if prefix == "model" else "exp_avg."}
    return loaded.iteration


def state_bytes() -> int:
    """Count the bytes of the state, each tensor once."""
    return 2 * sum(tensor_by_name(n, s, d).nbytes for n, (s, _, d) in TENSORS.items())
