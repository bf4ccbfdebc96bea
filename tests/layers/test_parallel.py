"""Collectives, parallel layers, vocabulary padding: on several ranks what the plain layers are on one."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import on_ranks

from megatron.mesh.grid import Grid
from megatron.mesh.mesh import Axis, Mesh
from megatron.parallel import collectives
from megatron.parallel.cross_entropy import fused_linear_cross_entropy
from megatron.parallel.embedding import VocabEmbedding, VocabShard
from megatron.parallel.linear import ColumnLinear, RowLinear, column_linears
from megatron.parallel.spec import param_spec
from megatron.parallel.tensor_parallel import TensorParallel


def tp_axis() -> Axis:
    if not dist.is_initialized():
        return Axis.alone("tp")
    return Mesh.build(Grid(tp=dist.get_world_size()), dist.get_rank()).tp


def fill_parameters(module: torch.nn.Module) -> torch.nn.Module:
    """Every parameter as its part of one whole tensor, the same on all layouts."""
    with torch.no_grad():
        for number, parameter in enumerate(module.parameters()):
            spec = param_spec(parameter)
            whole = torch.randn(spec.shape, generator=torch.Generator().manual_seed(number))
            parameter.zero_()
            spec.local(parameter).copy_(whole[spec.part.slices])
    return module


def draw(*shape: int, seed: int = 99) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# Collectives.


def every_pair(dim: int):
    """Each differentiable collective, forward and backward, against what it should be."""
    axis = tp_axis()
    shape = (8, 8, 8)
    wholes = [draw(*shape, seed=r) for r in range(axis.size)]
    mine = collectives.own_slice(wholes[0], axis, dim)
    outputs = {}
    for name, x in {
        "copy_to": wholes[axis.rank],
        "reduce_from": wholes[axis.rank],
        "scatter_to": wholes[0],
        "gather_from": mine,
        "reduce_scatter_to": wholes[axis.rank],
        "gather_and_reduce_grad": mine,
    }.items():
        x = x.clone().requires_grad_()
        before = x.detach().clone()
        arguments = (x, axis) if name in ("copy_to", "reduce_from") else (x, axis, dim)
        y = getattr(collectives, name)(*arguments)
        weight = draw(*y.shape, seed=1000 + (axis.rank if name in ("copy_to", "gather_and_reduce_grad") else 0))
        (y * weight).sum().backward()
        assert torch.equal(x.detach(), before), f"{name} changed its argument"
        outputs[name] = (y.detach(), x.grad)
    return outputs


@pytest.mark.parametrize("dim", [0, 2])
@pytest.mark.parametrize("world", [2, 4])
def test_conjugate_pairs(world, dim):
    wholes = [draw(8, 8, 8, seed=r) for r in range(world)]
    total = torch.stack(wholes).sum(0)
    weights = [draw(8, 8, 8, seed=1000 + r) for r in range(world)]
    share = 8 // world
    for rank, out in enumerate(on_ranks(world, every_pair, dim)):

        def part(x, rank=rank):
            return x.narrow(dim, rank * share, share)

        small = draw(*part(total).shape, seed=1000)
        expected = {
            "copy_to": (wholes[rank], torch.stack(weights).sum(0)),
            "reduce_from": (total, weights[0]),
            "scatter_to": (part(wholes[0]), torch.cat([small] * world, dim)),
            "gather_from": (wholes[0], part(weights[0])),
            "reduce_scatter_to": (part(total), torch.cat([small] * world, dim)),
            "gather_and_reduce_grad": (wholes[0], part(torch.stack(weights).sum(0))),
        }
        for name, (forward, backward) in expected.items():
            torch.testing.assert_close(out[name][0], forward, msg=lambda m, n=name: f"{n} forward: {m}")
            torch.testing.assert_close(out[name][1], backward, msg=lambda m, n=name: f"{n} backward: {m}")


# Linear layers.


def mlp(sequence_parallel: bool, two: bool):
    """Column then row, as in a layer; output, input gradient and parameter gradients as their parts."""
    tp, cut = tp_axis(), TensorParallel(tp_axis(), sequence_parallel)
    layers = torch.nn.ModuleDict(
        {
            "up": ColumnLinear(12, 16, cut, bias=True),
            "gate": ColumnLinear(12, 16, cut, bias=False),
            "down": RowLinear(16, 12, cut, bias=True),
        }
    )
    fill_parameters(layers.double())  # so that only the order of sums differs, far below the tolerance
    x = draw(8, 3, 12).double()
    x = (collectives.own_slice(x, tp) if sequence_parallel else x).clone().requires_grad_()
    if two:
        gate, up = column_linears(x, [layers["gate"], layers["up"]])
        y = layers["down"](gate * up)
    else:
        y = layers["down"](layers["up"](x).square())
    weight = draw(8, 3, 12, seed=7).double()
    (y * (collectives.own_slice(weight, tp) if sequence_parallel else weight)).sum().backward()
    grads = {}
    for name, parameter in layers.named_parameters():
        if parameter.grad is None:
            continue
        spec, grad = param_spec(parameter), parameter.grad
        for _ in spec.sum_grad_over:
            grad = collectives.all_reduce(grad.clone(), tp)
        grads[name] = (spec.part.slices, grad)
    return y.detach(), x.grad, grads


@pytest.mark.parametrize("two", [False, True])
@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("world", [2, 4])
def test_column_and_row_are_the_whole_layers(world, sequence_parallel, two):
    y, grad_x, grads = mlp(False, two)
    ranks = on_ranks(world, mlp, sequence_parallel, two)
    if sequence_parallel:
        ranks = [(torch.cat([r[0] for r in ranks]), torch.cat([r[1] for r in ranks]), r[2]) for r in ranks]
    for got_y, got_x, got in ranks:
        torch.testing.assert_close(got_y, y)
        torch.testing.assert_close(got_x, grad_x)
        assert set(got) == set(grads)
        for name, (where, grad) in got.items():
            torch.testing.assert_close(grad, grads[name][1][where], msg=lambda m, n=name: f"{n}: {m}")


def test_size_one_is_the_plain_layer_bit_for_bit():
    alone, x = TensorParallel(Axis.alone("tp"), sequence_parallel=True), draw(4, 2, 12)
    column = fill_parameters(ColumnLinear(12, 16, alone, bias=True))
    row = fill_parameters(RowLinear(12, 16, alone, bias=True))
    for layer in (column, row):
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    table = fill_parameters(VocabEmbedding(VocabShard.for_rank(100, alone.axis, 64), 12, alone))
    tokens = torch.randint(0, 100, (4, 5))
    assert torch.equal(table(tokens), F.embedding(tokens, table.weight))


def test_sizes_that_do_not_divide_are_refused():
    two = TensorParallel(Axis("tp", 2, 0, (0, 1)))
    with pytest.raises(ValueError, match="15 output features do not divide over 2"):
        ColumnLinear(8, 15, two, bias=False)
    with pytest.raises(ValueError, match="15 input features do not divide over 2"):
        RowLinear(15, 8, two, bias=False)


# Vocabulary.


@pytest.mark.parametrize(("size", "held"), [(1, 50304), (2, 25216), (8, 6400)])
def test_vocabulary_padding_is_megatrons(size, held):
    vocab, divisor = 50257, 128
    shards = [VocabShard.for_rank(vocab, Axis("tp", size, r, tuple(range(size))), divisor) for r in range(size)]
    assert {s.padded_size for s in shards} == {held}
    assert sum(s.size for s in shards) == vocab
    assert [s.start for s in shards[1:]] == [s.start + s.size for s in shards[:-1]]


def vocabulary(vocab: int, divisor: int, sequence_parallel: bool, rows: int):
    """Embedding and loss over a cut vocabulary, `rows` tokens a chunk: outputs, gradients of table, input and head."""
    tp = tp_axis()
    shard = VocabShard.for_rank(vocab, tp, divisor)
    table = fill_parameters(VocabEmbedding(shard, 6, TensorParallel(tp, sequence_parallel)))
    tokens = torch.randint(0, vocab, (8, 2), generator=torch.Generator().manual_seed(3))
    x = table(tokens)
    weight = draw(8, 2, 6)
    (x * (collectives.own_slice(weight, tp) if sequence_parallel else weight)).sum().backward()
    head = torch.full((shard.padded_size, 6), 50.0)  # padding that would win every softmax if it were counted
    head[: shard.size] = draw(vocab, 6)[shard.start : shard.start + shard.size]
    hidden, head = draw(10, 6, seed=8).requires_grad_(), head.requires_grad_()
    labels = torch.randint(0, vocab, (10,), generator=torch.Generator().manual_seed(4))
    loss = fused_linear_cross_entropy(collectives.copy_to(hidden, tp), head, labels, MASK, shard, tp, rows=rows)
    (loss * 3.0).backward()
    assert not head.grad[shard.size :].any() and not table.weight.grad[shard.size :].any()
    part = slice(shard.start, shard.start + shard.size)
    return x.detach(), loss.detach(), part, table.weight.grad[: shard.size], hidden.grad, head.grad[: shard.size]


MASK = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.5, 1.0, 1.0, 0.0, 1.0, 2.0])


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize(("world", "vocab", "divisor", "rows"), [(2, 127, 8, 3), (4, 127, 8, 10), (4, 5, 4, 1)])
def test_a_cut_vocabulary_gives_the_unpadded_loss(world, vocab, divisor, rows, sequence_parallel):
    """Also on ranks that hold padding alone, and for any chunk; the reference is torch's own loss of whole logits."""
    hidden, head = draw(10, 6, seed=8).requires_grad_(), draw(vocab, 6).requires_grad_()
    labels = torch.randint(0, vocab, (10,), generator=torch.Generator().manual_seed(4))
    plain = (F.cross_entropy(hidden @ head.t(), labels, reduction="none") * MASK).sum()
    (plain * 3.0).backward()
    x, alone, _, table_grad, alone_hidden, alone_head = vocabulary(vocab, divisor, False, rows)
    ranks = on_ranks(world, vocabulary, vocab, divisor, sequence_parallel, rows)
    if sequence_parallel:
        torch.testing.assert_close(torch.cat([r[0] for r in ranks]), x)
    for got_x, loss, part, got_table, got_hidden, got_head in [
        *ranks,
        (x, alone, slice(0, vocab), table_grad, alone_hidden, alone_head),
    ]:
        if not sequence_parallel:
            torch.testing.assert_close(got_x, x)
        torch.testing.assert_close(loss, plain.detach(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(got_table, table_grad[part])
        torch.testing.assert_close(got_hidden, hidden.grad)
        torch.testing.assert_close(got_head, head.grad[part])


def test_a_loss_without_gradients_makes_none():
    alone = Axis.alone("tp")
    x, weight, shard = draw(10, 6).requires_grad_(), torch.nn.Parameter(draw(8, 6)), VocabShard.for_rank(8, alone, 8)
    with torch.no_grad(), torch.profiler.profile() as trace:
        loss = fused_linear_cross_entropy(x, weight, torch.arange(10) % 8, MASK, shard, alone)
    assert not loss.requires_grad and loss > 0
    assert sum(event.count for event in trace.key_averages() if event.key == "aten::mm") == 1, "the logits alone"
