"""Gradients accumulated and reduced in bf16: half the bytes, one update in fp32, and no further from fp32 than one process."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import pytest
import torch
from ranks import on_ranks
from reference import GPT2, accumulate_gradients, advance, micro_batches, start_run, train_steps, with_dropout
from test_distributed_optimizer import ADAM, ShardedSetting, difference, join_rectangles, rectangles, tied_copies, train
from test_precision import STEADY, UNTIED, distance, train_losses

from megatron.config.schema import OptimSettings, PrecisionConfig
from megatron.mesh.grid import Grid
from megatron.optim.precision import Precision
from megatron.parallel.spec import param_spec
from megatron.plan.enough_memory import rank_states

BF16 = PrecisionConfig(bf16=True)
HALF = PrecisionConfig(bf16=True, grad_reduce_in_bf16=True)
PLAIN = ShardedSetting(replace(GPT2, num_layers=4), precision=HALF, optim=STEADY, masked=True)
SHARDED = dict(sharded=True, overlap_reduce=True, overlap_gather=True)
LAYOUTS = {
    "dp 2": dict(),
    "dp 2, sharded, overlapped": SHARDED,
    "tp 2": dict(tp=2),
    "tp 2, sequence parallel": dict(tp=2, sequence_parallel=True),
    "pp 2, zb-h1": dict(pp=2, schedule="zb-h1"),
}
STEPS = 12
NEAR = ShardedSetting(UNTIED, precision=HALF, optim=STEADY)


def test_a_precision_says_what_gradients_are():
    assert [Precision.from_config(p).gradients for p in (PrecisionConfig(), BF16, HALF)] == [
        torch.float32,
        torch.float32,
        torch.bfloat16,
    ]


@cache
def losses_of_one_process(precision: PrecisionConfig) -> list[float]:
    return train_losses(replace(NEAR, precision=precision), STEPS)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_as_near_as_one_process(layout):
    """Another order of sums rounds otherwise: no further from fp32 than rounding takes one process."""
    rounding = distance(losses_of_one_process(HALF), losses_of_one_process(PrecisionConfig()))
    assert 0.0 < rounding < 0.02 and losses_of_one_process(HALF) != losses_of_one_process(BF16)
    for losses in on_ranks(2, train_losses, replace(NEAR, **LAYOUTS[layout]), STEPS):
        assert distance(losses, losses_of_one_process(HALF)) < 2.0 * rounding
        assert distance(losses, losses_of_one_process(PrecisionConfig())) < 2.0 * rounding


def bytes_and_formats(setting: ShardedSetting):
    """Bytes of buffers and moments; formats of what is reduced and of what the update is given; pipeline rank."""
    run = start_run(setting, 1)
    optimizer, given = run.optimizer, []
    step = optimizer.update.step

    def spy(number, grad):
        buffer = optimizer.buffers[number]
        own = buffer.own_grads
        given.append(grad.dtype is torch.float32 and grad.shape == own.shape == buffer.main.shape)
        given.append(grad.data_ptr() != own.data_ptr() and not grad.allclose(torch.zeros(())))
        step(number, grad)

    optimizer.update.step = spy
    train_steps(run, setting, 1)
    buffers = optimizer.buffers
    for buffer in buffers:
        assert buffer.grads.dtype is torch.bfloat16
        assert all(p.main_grad.dtype is torch.bfloat16 and p.grad is p.main_grad for p in buffer.parameters)
    weights = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for b in buffers for t in (b.weights, b.main)}
    moments = sum(t.untyped_storage().nbytes() for n in range(len(buffers)) for t in optimizer.update.state(n).values())
    gradients = sum(b.grads.untyped_storage().nbytes() for b in buffers)
    return (sum(weights.values()), gradients, moments), given, run.mesh.pp.rank


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("layout", ["dp 2", "tp 2, sequence parallel", "pp 2, zb-h1"])
def test_bytes_are_those_of_the_formula(layout, sharded):
    setting = replace(PLAIN, **LAYOUTS[layout], sharded=sharded)
    config = setting.config(2, 1)
    grid = Grid.from_layout(config.layout, 2)
    for found, given, pp_rank in on_ranks(2, bytes_and_formats, setting):
        (memory,) = rank_states(config, grid, [grid.rank(pp=pp_rank)])
        assert found == (memory.weights, memory.gradients, memory.optimizer)
        assert given and all(given), "the update works in fp32, on the slice alone"


@pytest.mark.parametrize("sharded", [False, True])
def test_overlap_changes_no_bit(sharded):
    setting = replace(PLAIN, optim=ADAM, sharded=sharded)
    during = replace(setting, overlap_reduce=True, overlap_gather=sharded)
    for plain, overlapping in zip(on_ranks(2, train, setting, 4), on_ranks(2, train, during, 4), strict=True):
        assert plain[0] == overlapping[0]
        assert all(torch.equal(a[3], b[3]) for a, b in zip(plain[1], overlapping[1], strict=True))
        assert plain[3] == [0] * 4 and overlapping[3] == [0, *[overlapping[5]] * 3]


def test_slices_hold_the_bits_of_the_whole():
    """Without clipping: the norm adds a slice's squares in another order."""
    setting = replace(PLAIN, optim=replace(ADAM, clip_grad=0.0))
    whole, sliced = on_ranks(2, train, setting, 4), on_ranks(2, train, replace(setting, **SHARDED), 4)
    assert [a for a, _ in whole[0][0]] == [b for b, _ in sliced[0][0]]
    assert difference(join_rectangles([held for _, held, *_ in sliced]), join_rectangles([whole[0][1]])) == 0.0


@pytest.mark.parametrize("sharded", [False, True])
def test_tied_copies_stay_equal(sharded):
    setting = replace(PLAIN, pp=2, global_batch=6, sharded=sharded, overlap_reduce=True)
    copies = on_ranks(6, tied_copies, setting, 3)
    assert all(torch.equal(copy, copies[0]) for copy in copies)


def one_step(setting: ShardedSetting, limit: float):
    """The reported norm, that of the gradients in fp64, and the largest step that plain SGD takes."""
    optim = OptimSettings(optimizer="sgd", sgd_momentum=0.0, lr=1.0, clip_grad=limit)
    setting = replace(setting, optim=optim)
    run = start_run(setting, 1)
    accumulate_gradients(run, setting)
    before = join_rectangles([rectangles(run.weights.shards())])
    report = run.optimizer.step(lr=1.0, weight_decay=0.0, scale=0.5)
    after = join_rectangles([rectangles(run.weights.shards())])
    exact = math.sqrt(sum(float((0.5 * b.own_grads.double()).square().sum()) for b in run.optimizer.buffers))
    moved = math.sqrt(sum(float((after[n].double() - before[n].double()).square().sum()) for n in before))
    return report.grad_norm, exact, moved


@pytest.mark.parametrize("limit", [0.0, 0.1])
def test_the_norm_and_the_clipping_are_fp32s(limit):
    """A norm that were made in bf16 would have three digits."""
    norm, exact, moved = one_step(replace(PLAIN, masked=False), limit)
    assert norm == pytest.approx(exact, rel=1e-6) and norm > 0.2
    assert moved == pytest.approx(limit or exact, rel=1e-3)


def train_with_poison(setting: ShardedSetting, victim: int, value: float):
    """Return whether the second step was skipped, what it changed, and whether training went on after it."""
    run = start_run(setting, 3)
    run_step = run.pipeline.step

    def step(batches):
        output = run_step(batches)
        if run.state.iteration == 1 and run.mesh.rank == victim:
            next(iter(run.stages.values())).layers["0"].mlp.up.weight.main_grad.view(-1)[5] = value
        return output

    run.pipeline.step = step
    skips, same = [], []
    for _ in range(3):
        before = rectangles(run.weights.shards())
        batches = micro_batches(setting, 127, run.state.consumed_samples, run.mesh.dp.rank, run.mesh.dp.size)
        report = run.step(batches, run.state)
        advance(run, report)
        skips.append(report.skipped)
        same.append(all(torch.equal(a[3], b[3]) for a, b in zip(before, rectangles(run.weights.shards()), strict=True)))
    return skips, same


# Without the overlapped reduction, which has begun before the gradient is broken here.
@pytest.mark.parametrize("changes", [dict(sharded=True, overlap_gather=True), dict(tp=2)], ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_skips_the_step_on_all(changes, value):
    for skips, same in on_ranks(2, train_with_poison, replace(PLAIN, **changes), 1, value):
        assert skips == same == [False, True, False]


def test_a_resumed_run_is_the_interrupted_one():
    setting = replace(PLAIN, model=with_dropout(PLAIN.model), optim=ADAM)
    whole, second = start_run(setting, 6), start_run(setting, 6)
    train_steps(whole, setting, 3)
    for mine, its in zip((whole.weights, whole.optimizer), (second.weights, second.optimizer), strict=True):
        for ours, theirs in zip(mine.shards(), its.shards(), strict=True):
            assert ours.dtype is theirs.dtype is torch.float32
            theirs.data.copy_(ours.data)
        its.load_scalars(mine.scalars())
    second.state.load_scalars(whole.state.scalars())
    assert train_steps(second, setting, 3) == train_steps(whole, setting, 3)


def copy_not_finite(setting: ShardedSetting, victim: int):
    """A norm's gradient is the same on all ranks of tp, and the norm counts the first one's; here one rank's is broken."""
    run = start_run(setting, 1)
    accumulate_gradients(run, setting)
    before = rectangles(run.weights.shards())
    weight = next(iter(run.stages.values())).layers["0"].mlp_norm.weight
    assert not param_spec(weight).split_over and not param_spec(weight).sum_grad_over
    if run.mesh.tp.rank == victim:
        weight.main_grad[1] = torch.inf
    report = run.optimizer.step(lr=1e-2, weight_decay=0.0, scale=1.0)
    unchanged = all(torch.equal(a[3], b[3]) for a, b in zip(before, rectangles(run.weights.shards()), strict=True))
    return report.skipped, report.grad_norm, unchanged


@pytest.mark.parametrize("precision", [PrecisionConfig(), HALF], ids=["fp32", "bf16"])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_copy_that_is_not_finite_skips_the_step_on_all(victim, precision):
    for skipped, norm, unchanged in on_ranks(2, copy_not_finite, replace(PLAIN, tp=2, precision=precision), victim):
        assert skipped and norm == math.inf and unchanged
