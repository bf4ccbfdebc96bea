"""Tensor parallelism as a value: what a region is given, what leaves it, and whose gradients are summed."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from torch import Tensor

from megatron.mesh.grid import Grid
from megatron.mesh.mesh import Axis, Mesh
from megatron.parallel.collectives import all_reduce
from megatron.parallel.spec import Part, param_spec
from megatron.parallel.tensor_parallel import TensorParallel

SEQ, WIDTH = 8, 12


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def region(sequence_parallel: bool) -> dict[str, Tensor]:
    """Scale, enter, multiply by this rank's features and back, leave, join; outputs and gradients, whole."""
    axis = Mesh.build(Grid(tp=dist.get_world_size()), dist.get_rank()).tp if dist.is_initialized() else Axis.alone("tp")
    tp = TensorParallel(axis, sequence_parallel)
    features, here = tp.share(WIDTH, "features"), tp.positions(SEQ)
    scale = tp.parameter(4, init="ones")
    weight = tp.slice_parameter((WIDTH, 4), Part((features.start, 0), (len(features), 4)))
    with torch.no_grad():
        scale.data, weight.data = draw(4, seed=1), draw(WIDTH, 4, seed=2)[features.start : features.stop]
    x = draw(SEQ, 3, 4, seed=3)[here].requires_grad_()
    inner = (tp.enter(x * scale) @ weight.t()).square()  # [seq, 3, features]
    left = tp.leave(inner @ weight)
    y = tp.join(left)
    ((y * draw(SEQ, 3, 4, seed=4)).sum() if not sequence_parallel else (left * draw(SEQ, 3, 4, seed=4)[here]).sum()).backward()
    assert x.grad is not None and scale.grad is not None and weight.grad is not None
    scale_grad = all_reduce(scale.grad, axis) if param_spec(scale).sum_grad_over else scale.grad
    assert param_spec(weight).split_over == {"tp"} and not param_spec(weight).sum_grad_over
    return {"y": y.detach(), "x": tp.join(x.grad), "scale": scale_grad, "weight": weight.grad}


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("world", [2, 4])
def test_a_region_computes_what_one_process_does(world: int, sequence_parallel: bool) -> None:
    whole = region(sequence_parallel)
    ranks = on_ranks(world, region, sequence_parallel)
    for found in ranks:
        for name in ("y", "x", "scale"):
            torch.testing.assert_close(found[name], whole[name], msg=lambda m, name=name: f"{name}: {m}")
    torch.testing.assert_close(torch.cat([found["weight"] for found in ranks]), whole["weight"])


def test_shares_and_positions_cover_everything_once() -> None:
    ranks = [TensorParallel(Axis("tp", 4, rank, (0, 1, 2, 3)), sequence_parallel=True) for rank in range(4)]
    assert [i for tp in ranks for i in tp.share(12, "heads")] == list(range(12))
    assert [i for tp in ranks for i in range(SEQ)[tp.positions(SEQ)]] == list(range(SEQ))
    assert all(tp.on_whole_sequences.positions(SEQ) == slice(0, SEQ) for tp in ranks)
    assert not any(param_spec(tp.on_whole_sequences.parameter(2, init="zeros")).sum_grad_over for tp in ranks)
    with pytest.raises(ValueError, match="6 heads do not divide over 4 tensor-parallel ranks"):
        ranks[0].share(6, "6 heads")


def test_one_rank_is_never_sequence_parallel() -> None:
    alone = TensorParallel(Axis.alone("tp"), sequence_parallel=True)
    x = draw(SEQ, 4, seed=5)
    assert alone == TensorParallel.alone() and not alone.sequence_parallel
    assert alone.enter(x) is x and alone.leave(x) is x and alone.join(x) is x
