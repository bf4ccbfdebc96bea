"""What only a GPU can show: the same run as on a CPU, in bf16 and compiled, and ranks that share one card."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from reference import GPT2, LLAMA, Setting, dropping, go, trajectory

from megatron.mesh.launch import Job
from megatron.mesh.place import Place
from megatron.train.run import build

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
STEPS = 20


def on_gpu(setting: Setting, steps: int, compiled: bool = False) -> list[tuple[float, float]]:
    """The curve of a run on this process's GPU; several ranks share card 0 and talk over gloo."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if dist.is_initialized() else 0
    config = setting.config(world, steps)
    config = replace(config, batch=replace(config.batch, compile=compiled))
    return go(build(config, Job(Place(rank, world), torch.device("cuda", 0), "gloo" if world > 1 else None)), setting, steps)


def spread(curve, expected) -> float:
    pairs = [pair for ours, theirs in zip(curve, expected, strict=True) for pair in zip(ours, theirs, strict=True)]
    return max(abs(a - b) / abs(b) for a, b in pairs)


@pytest.mark.parametrize("model", [GPT2, dropping(GPT2), dropping(LLAMA)], ids=["gpt2", "gpt2-dropout", "llama-dropout"])
def test_fp32_is_the_cpus_run(model):
    """Initial weights and dropout masks are the CPU's bit for bit; only the order of sums differs."""
    setting = Setting(model)
    assert spread(on_gpu(setting, STEPS), trajectory(setting, STEPS)[0]) < 1e-3


@pytest.mark.parametrize("compiled", [False, True])
def test_bf16_follows_fp32(compiled):
    expected = [loss for loss, _ in trajectory(Setting(GPT2), STEPS)[0]]
    curve = [loss for loss, _ in on_gpu(replace(Setting(dropping(GPT2)), model=GPT2, bf16=True), STEPS, compiled)]
    assert max(abs(a - b) / b for a, b in zip(curve, expected, strict=True)) < 0.03


def test_compiled_dropout_is_the_same_run():
    setting = Setting(dropping(LLAMA))
    assert spread(on_gpu(setting, STEPS, compiled=True), on_gpu(setting, STEPS)) < 1e-3


@pytest.mark.parametrize(("tp", "sequence_parallel"), [(1, False), (2, False), (2, True)])
def test_ranks_that_share_a_card_are_the_same_run(tp, sequence_parallel):
    setting = Setting(dropping(GPT2))
    expected = on_gpu(setting, STEPS)
    for curve in on_ranks(2, on_gpu, replace(setting, tp=tp, sequence_parallel=sequence_parallel), STEPS):
        assert spread(curve, expected) < 1e-4


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "zb-h1", "zb-v"])
def test_a_pipeline_on_one_card_is_the_same_run(schedule):
    setting = Setting(replace(dropping(GPT2), num_layers=4))
    expected = on_gpu(setting, STEPS)
    piped = replace(setting, pp=2, schedule=schedule, per_virtual_stage=1 if schedule == "interleaved" else None)
    for curve in on_ranks(2, on_gpu, piped, STEPS):
        assert spread(curve, expected) < 1e-4
