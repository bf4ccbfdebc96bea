"""Checks that only a GPU allows.

The same run as on a CPU, in bf16 and compiled, ranks that share one card, and products that add themselves to fp32 gradients.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from reference import GPT2, LLAMA, Setting, train_steps, trajectory, with_dropout

from megatron.config.schema import PrecisionConfig
from megatron.launch.environment import LaunchEnvironment
from megatron.launch.job import Job
from megatron.parallel.weight_grad import add_weight_grad, supports_fused_weight_grad
from megatron.train.run import build_run

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
STEPS = 20


def on_gpu(setting: Setting, steps: int, compiled: bool = False) -> list[tuple[float, float]]:
    """The curve of a run on this process's GPU; several ranks share card 0 and talk over gloo."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if dist.is_initialized() else 0
    config = setting.config(world, steps)
    config = replace(config, batch=replace(config.batch, compile=compiled))
    return train_steps(
        build_run(config, Job(LaunchEnvironment(rank, world), torch.device("cuda", 0), "gloo" if world > 1 else None)),
        setting,
        steps,
    )


def spread(curve, expected) -> float:
    pairs = [pair for ours, theirs in zip(curve, expected, strict=True) for pair in zip(ours, theirs, strict=True)]
    return max(abs(a - b) / abs(b) for a, b in pairs)


@pytest.mark.parametrize(
    "model", [GPT2, with_dropout(GPT2), with_dropout(LLAMA)], ids=["gpt2", "gpt2-dropout", "llama-dropout"]
)
def test_fp32_is_the_cpus_run(model):
    """Initial weights and dropout masks are the CPU's bit for bit; only the order of sums differs."""
    setting = Setting(model)
    assert spread(on_gpu(setting, STEPS), trajectory(setting, STEPS)[0]) < 1e-3


@pytest.mark.parametrize("compiled", [False, True])
def test_bf16_follows_fp32(compiled):
    expected = [loss for loss, _ in trajectory(Setting(GPT2), STEPS)[0]]
    curve = [loss for loss, _ in on_gpu(replace(Setting(with_dropout(GPT2)), model=GPT2, bf16=True), STEPS, compiled)]
    assert max(abs(a - b) / b for a, b in zip(curve, expected, strict=True)) < 0.03


def test_compiled_dropout_is_the_same_run():
    setting = Setting(with_dropout(LLAMA))
    assert spread(on_gpu(setting, STEPS, compiled=True), on_gpu(setting, STEPS)) < 1e-3


@pytest.mark.parametrize(("tp", "sequence_parallel"), [(1, False), (2, False), (2, True)])
def test_ranks_that_share_a_card_are_the_same_run(tp, sequence_parallel):
    setting = Setting(with_dropout(GPT2))
    expected = on_gpu(setting, STEPS)
    for curve in on_ranks(2, on_gpu, replace(setting, tp=tp, sequence_parallel=sequence_parallel), STEPS):
        assert spread(curve, expected) < 1e-4


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "zb-h1", "zb-v"])
def test_a_pipeline_on_one_card_is_the_same_run(schedule):
    setting = Setting(replace(with_dropout(GPT2), num_layers=4))
    expected = on_gpu(setting, STEPS)
    piped = replace(setting, pp=2, schedule=schedule, per_virtual_stage=1 if schedule == "interleaved" else None)
    for curve in on_ranks(2, on_gpu, piped, STEPS):
        assert spread(curve, expected) < 1e-4


CARD = torch.device("cuda", 0)


def factors(number: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Make the factors of one micro-batch's weight gradient: `[tokens, out]` and `[tokens, in]`."""
    generator = torch.Generator().manual_seed(number)
    return tuple(torch.randn(512, n, generator=generator).to(CARD, dtype) for n in (384, 256))  # type: ignore[return-value]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_products_that_add_themselves_are_more_exact(dtype):
    """Over 64 micro-batches, against fp64: sums in fp32, and not of products that were rounded to 16 bit."""
    assert supports_fused_weight_grad(CARD)
    exact = torch.zeros(384, 256, dtype=torch.float64, device=CARD)
    fused, plain = (torch.zeros(384, 256, device=CARD) for _ in range(2))
    storage = fused.data_ptr()
    for number in range(64):
        rows, x = factors(number, dtype)
        exact += rows.t().double() @ x.double()
        add_weight_grad(fused, rows, x)
        plain += rows.t() @ x
    assert fused.data_ptr() == storage and fused.dtype is torch.float32
    errors = [float((total.double() - exact).norm() / exact.norm()) for total in (fused, plain)]
    assert errors[0] < 1e-5 < errors[1] and errors[0] < 0.05 * errors[1]


def test_the_product_adds_into_a_view_of_a_flat_buffer():
    """As the gradients of parameters lie; what is beside it stays as it was. Also where the factors have odd sizes."""
    for out, into in ((384, 256), (127, 33)):
        flat = torch.ones(64 + out * into + 64, device=CARD)
        view = flat[64 : 64 + out * into].view(out, into)
        rows, x = (torch.randn(48, n, device=CARD, dtype=torch.bfloat16) for n in (out, into))
        add_weight_grad(view, rows, x)
        assert torch.allclose(view, 1.0 + rows.t().float() @ x.float(), rtol=1e-4, atol=1e-3)
        assert (flat[:64] == 1.0).all() and (flat[-64:] == 1.0).all()


def fused_run(setting: Setting, fused: bool, steps: int):
    """The curve of a run on card 0."""
    return on_gpu(replace(setting, precision=replace(setting.precision, gradient_accumulation_fusion=fused)), steps)


@pytest.mark.parametrize("form", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_a_run_with_fusion_is_the_run_without_it(form):
    setting = Setting(form, precision=PrecisionConfig(bf16=True))
    fused, plain = fused_run(setting, True, STEPS), fused_run(setting, False, STEPS)
    assert fused != plain, "fusion is on by default and rounds less"
    assert all(a == pytest.approx(b, rel=0.03) for (a, _), (b, _) in zip(fused, plain, strict=True))


@pytest.mark.parametrize("layout", [dict(tp=2, sequence_parallel=True), dict(pp=2, schedule="zb-h1")], ids=str)
def test_ranks_with_fusion_are_the_run_without_it(layout):
    """Also through W actions, whose products come later."""
    setting = Setting(replace(GPT2, num_layers=4), precision=PrecisionConfig(bf16=True))
    expected = [loss for loss, _ in fused_run(setting, False, STEPS)]
    for curve in on_ranks(2, fused_run, replace(setting, **layout), True, STEPS):
        assert all(a == pytest.approx(b, rel=0.03) for (a, _), b in zip(curve, expected, strict=True))


def test_gradients_in_bf16_follow_fp32():
    expected = [loss for loss, _ in trajectory(Setting(GPT2), STEPS)[0]]
    half = Setting(GPT2, precision=PrecisionConfig(bf16=True, grad_reduce_in_bf16=True))
    assert all(a == pytest.approx(b, rel=0.05) for (a, _), b in zip(on_gpu(half, STEPS), expected, strict=True))
