"""Number formats: fp16 overflows on one rank and all skip; fp16 and bf16 stay near fp32, in every layout; resume."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import cache

import pytest
import torch
from ranks import on_ranks
from reference import GPT2, Setting, advance, micro_batches, start_run, train_steps, trajectory

from megatron.config.schema import OptimSettings, PrecisionConfig
from megatron.mesh.mesh import Axis
from megatron.optim.precision import Precision
from megatron.optim.scaler import ConstantScaler, DynamicScaler
from megatron.parallel.cross_entropy import fused_linear_cross_entropy
from megatron.parallel.embedding import VocabShard

FP16 = PrecisionConfig(fp16=True, initial_loss_scale=2.0**14, loss_scale_window=4, hysteresis=2)
UNTIED = replace(GPT2, untie_embeddings_and_output_weights=True)
LAYOUTS = {
    "dp 2": dict(),
    "tp 2": dict(tp=2),
    "tp 2, sequence parallel": dict(tp=2, sequence_parallel=True),
    "pp 2, 1f1b": dict(pp=2, schedule="1f1b"),
    "pp 2, zb-h1": dict(pp=2, schedule="zb-h1"),
}


def test_a_precision_is_a_value():
    of = {name: Precision.from_config(PrecisionConfig(**{name: True})) for name in ("fp16", "bf16")}
    assert [Precision.from_config(PrecisionConfig()).compute, of["bf16"].compute, of["fp16"].compute] == [
        torch.float32, torch.bfloat16, torch.float16,
    ]  # fmt: skip
    assert of["fp16"].scaler() == DynamicScaler(2.0**32, 1.0, 1000, 2) and of["bf16"].scaler() == ConstantScaler()
    assert Precision.from_config(PrecisionConfig(fp16=True, loss_scale=64.0)).scaler() == ConstantScaler(64.0)
    assert Precision.from_config(PrecisionConfig(fp16=True, loss_scale=0.0)).scaler() == of["fp16"].scaler()


# An overflow on one rank.

STEPS = 14
BAD = {2, 3, 8, 9}  # iterations whose gradient overflows
SCALES = [2.0**e for e in (14, 14, 13, 13, 13, 13, 14, 14, 13, 13, 13, 13, 14, 14)]  # after each: windows 4-7 and 10-13


def copy_state(run):
    """Everything that an update changes, on this rank."""
    tensors = [s.data for part in (run.weights, run.optimizer) for s in part.shards()]
    weights = [p.data for stage in run.stages.values() for p in stage.parameters()]
    return [t.clone() for t in (*tensors, *weights)], run.optimizer.scalars()["step"]


def train_with_overflows(setting: Setting, victim: int):
    """Losses, scales and skips; whether the skipped steps left everything as it was, bit for bit."""
    run = start_run(setting, STEPS)
    run_step = run.pipeline.step

    def step(batches):
        output = run_step(batches)
        if run.state.iteration + 1 in BAD and run.mesh.rank == victim:
            next(p for stage in run.stages.values() for p in stage.parameters()).main_grad.view(-1)[3] = torch.inf
        return output

    run.pipeline.step = step
    losses, scales, skips, same = [], [], [], []
    for _ in range(STEPS):
        before = copy_state(run)
        batches = micro_batches(setting, 127, run.state.consumed_samples, run.mesh.dp.rank, run.mesh.dp.size)
        report = run.step(batches, run.state)
        advance(run, report)
        after = copy_state(run)
        losses.append(report.lm_loss)
        scales.append(run.state.scaler.scale)
        skips.append(report.skipped)
        same.append(before[1] == after[1] and all(torch.equal(a, b) for a, b in zip(before[0], after[0], strict=True)))
    return losses, scales, skips, same, run.state.scheduled_samples


@pytest.mark.parametrize("layout", ["dp 2", "tp 2", "pp 2, 1f1b"])
@pytest.mark.parametrize("victim", [0, 1])
def test_an_overflow_on_one_rank_skips_the_step_on_all(layout, victim):
    setting = Setting(GPT2, precision=FP16, optim=OptimSettings(lr=1e-2, lr_decay_style="constant"), **LAYOUTS[layout])
    for losses, scales, skips, same, scheduled in on_ranks(2, train_with_overflows, setting, victim):
        assert scales == SCALES
        assert [number for number, skipped in enumerate(skips, 1) if skipped] == sorted(BAD)
        assert same == skips, "a skipped step changes nothing, and no other leaves all as it was"
        assert scheduled == (STEPS - len(BAD)) * setting.global_batch
        assert losses[-1] < 0.8 * losses[0]


def test_the_dynamic_scale_comes_down_from_where_it_begins():
    """Megatron-LM's 2^32 overflows in real gradients, and training goes on where it no longer does."""
    setting = Setting(GPT2, precision=PrecisionConfig(fp16=True))
    run = start_run(setting, 40)
    curve = train_steps(run, setting, 40)
    overflows = [norm for _, norm in curve if not math.isfinite(norm)]
    assert 10 < len(overflows) < 25
    assert run.state.scaler.scale == 2.0 ** (32 - len(overflows) + 1)
    assert curve[-1][0] < 0.8 * curve[0][0]


@pytest.mark.parametrize("average", ["token", "micro-batch"])
def test_a_scale_leaves_no_trace_in_gradients(average):
    """In fp32 a power of two changes no bit, of losses, of norms before clipping, or of weights."""
    plain = Setting(GPT2, masked=True, loss_average=average)
    scaled = replace(plain, precision=PrecisionConfig(loss_scale=1024.0))
    (curve, _, ended), (expected, _, final) = trajectory(scaled, 5), trajectory(plain, 5)
    assert curve == expected and all(torch.equal(ended[name][1], values) for name, (_, values) in final.items())
    half = trajectory(replace(plain, precision=FP16), 5)[0]
    assert half != expected
    assert all(norm == pytest.approx(other, rel=0.02) for (_, norm), (_, other) in zip(half, expected, strict=True))


# Near fp32.


def add_label_noise(batch):
    """Three labels in ten are random, so that the loss does not fall to nothing."""
    generator = torch.Generator().manual_seed(int(batch.samples[0]))
    chosen = torch.rand(batch.labels.shape, generator=generator) < 0.3
    return replace(batch, labels=torch.where(chosen, torch.randint(0, 127, chosen.shape, generator=generator), batch.labels))


def train_losses(setting: Setting, steps: int) -> list[float]:
    run, found = start_run(setting, steps), []
    for _ in range(steps):
        batches = micro_batches(setting, 127, run.state.consumed_samples, run.mesh.dp.rank, run.mesh.dp.size)
        report = run.step([add_label_noise(batch) for batch in batches], run.state)
        advance(run, report)
        found.append(report.lm_loss)
    return found


LONG = 200
STEADY = OptimSettings(lr=1e-2, lr_decay_style="constant")


@cache
def long_run(precision: PrecisionConfig) -> list[float]:
    return train_losses(Setting(UNTIED, micro_batch=2, precision=precision, optim=STEADY), LONG)


@pytest.mark.parametrize("scale", [2.0**32, 2.0**16])
def test_two_hundred_steps_of_fp16_end_where_fp32_ends(scale):
    expected = long_run(PrecisionConfig())
    found = long_run(PrecisionConfig(fp16=True, initial_loss_scale=scale))
    ends = [sum(losses[-20:]) / 20 for losses in (expected, found)]
    assert ends[0] < 0.5 * expected[0]
    assert abs(ends[1] / ends[0] - 1.0) < 0.02
    assert found != expected


SHORT = 20


@cache
def losses_of_one_process(name: str) -> list[float]:
    precision = {"fp32": PrecisionConfig(), "bf16": PrecisionConfig(bf16=True), "fp16": FP16}[name]
    return train_losses(Setting(UNTIED, precision=precision, optim=STEADY), SHORT)


def distance(losses: list[float], expected: list[float]) -> float:
    return max(abs(a - b) / b for a, b in zip(losses, expected, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("name", "precision"), [("bf16", PrecisionConfig(bf16=True)), ("fp16", FP16)])
def test_every_layout_is_as_near_as_one_process(name, precision, layout):
    """A layout adds in another order, which rounds otherwise: no further from fp32 than rounding takes one process."""
    rounding = distance(losses_of_one_process(name), losses_of_one_process("fp32"))
    assert 0.0 < rounding < (0.02 if name == "bf16" else 0.004)
    setting = Setting(UNTIED, precision=precision, optim=STEADY, **LAYOUTS[layout])
    for losses in on_ranks(2, train_losses, setting, SHORT):
        assert distance(losses, losses_of_one_process(name)) < 2.0 * rounding
        assert distance(losses, losses_of_one_process("fp32")) < 2.0 * rounding


# The output layer, whose gradients are made before the loss scale is known to them.


def head_gradients(dtype: torch.dtype, scale: float):
    """Return the fp64 gradients of hidden states and weight by the loss times `scale`, divided by it again."""
    generator = torch.Generator().manual_seed(3)
    axis = Axis.alone("tp")
    shard = VocabShard.for_rank(20011, axis, 128)
    x = torch.randn(256, 64, generator=generator).half().to(dtype).requires_grad_()
    weight = (torch.randn(shard.padded_size, 64, generator=generator) * 0.02).half().to(dtype).requires_grad_()
    labels = torch.randint(0, 100, (256,), generator=generator)
    (fused_linear_cross_entropy(x, weight, labels, torch.ones(256), shard, axis) * scale).backward()
    return x.grad.double() / scale, weight.grad.double() / scale


@pytest.mark.parametrize("scale", [2.0**17, 1.0, 2.0**-7])
def test_the_output_layer_keeps_small_gradients_and_large_scales(scale):
    """Also where the factor from above is no fp16 number; rows of words that never come have the smallest gradients."""
    x, weight = head_gradients(torch.float16, scale)
    exact_x, exact_weight = head_gradients(torch.float32, 1.0)
    for found, exact in ((x, exact_x), (weight[100:], exact_weight[100:])):
        assert (found - exact).norm() < (2e-2 if scale < 1.0 else 2e-3) * exact.norm()


def test_sums_over_many_tokens_end_nowhere():
    """8192 times 12 is no fp16 number, and neither is a sum over one chunk of so many tokens; their mean is one."""
    axis = Axis.alone("tp")
    x = torch.full((8192, 8), 12.0, dtype=torch.float16, requires_grad=True)
    weight = torch.zeros(64, 8, dtype=torch.float16, requires_grad=True)
    labels = torch.zeros(8192, dtype=torch.int64)
    (fused_linear_cross_entropy(x, weight, labels, torch.ones(8192), VocabShard.for_rank(64, axis, 64), axis) / 8192).backward()
    expected = torch.full((64, 8), 12.0 / 64)
    expected[0] -= 12.0
    assert torch.allclose(weight.grad.float(), expected, rtol=1e-3)


# Resume.


def test_a_resumed_scaler_is_the_interrupted_one():
    setting = Setting(GPT2, precision=replace(FP16, initial_loss_scale=2.0**20, loss_scale_window=3))
    whole = start_run(setting, 12)
    first = train_steps(whole, setting, 7)
    saved = json.loads(json.dumps(whole.state.scalars()))
    scaler = whole.state.scaler.scalars()
    assert scaler["updates"] > 0 or scaler["patience"] < 2, "the scaler stands somewhere in between"
    second = start_run(setting, 12)
    for mine, its in zip((whole.weights, whole.optimizer), (second.weights, second.optimizer), strict=True):
        for ours, theirs in zip(mine.shards(), its.shards(), strict=True):
            theirs.data.copy_(ours.data)
        its.load_scalars(mine.scalars())
    second.state.load_scalars(saved)
    assert second.state.scaler == whole.state.scaler != start_run(setting, 12).state.scaler
    assert train_steps(second, setting, 5) == train_steps(whole, setting, 5)
    assert second.state.scalars() == whole.state.scalars() and first
