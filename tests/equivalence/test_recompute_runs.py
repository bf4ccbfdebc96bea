"""Recomputation is the same run: every kind gives loss, gradient norm and weights of a run that keeps everything."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from ranks import on_ranks
from reference import (
    GPT2,
    LLAMA,
    Setting,
    main_weight_slices,
    max_relative_error,
    start_run,
    train_steps,
    trajectory,
    with_dropout,
)

from megatron.config.schema import MemoryConfig, OptimSettings
from megatron.parallel.recompute import Recompute

STEPS = 6
TOLERANCE = 1e-5
SGD = OptimSettings(optimizer="sgd", lr=0.1, lr_decay_style="constant")
MODELS = {
    "dropping": Setting(replace(with_dropout(GPT2), num_layers=5), masked=True, optim=SGD),
    "plain": Setting(replace(GPT2, num_layers=5), optim=SGD),
    "llama": Setting(replace(with_dropout(LLAMA), num_layers=5), optim=SGD),
    "fused": Setting(replace(with_dropout(GPT2), num_layers=5, fused_attention_dropout=True), optim=SGD),
    "bf16": Setting(replace(with_dropout(GPT2), num_layers=5), bf16=True, optim=SGD),
}
KINDS = {
    "selective": MemoryConfig("selective"),
    "uniform": MemoryConfig("full", "uniform", 2),
    "block": MemoryConfig("full", "block", 2),
    "uniform, distributed": MemoryConfig("full", "uniform", 2, distribute_saved_activations=True),
}


@cache
def one_process(name: str, steps: int = STEPS):
    return trajectory(MODELS[name], steps)


@pytest.mark.parametrize("kind", ["selective", "uniform", "block"])
@pytest.mark.parametrize("name", MODELS)
def test_one_process_to_the_last_bit(name, kind):
    expected, _, final = one_process(name)
    curve, _, ended = trajectory(replace(MODELS[name], memory=KINDS[kind]), STEPS)
    assert curve == expected and max_relative_error(final, ended) == 0.0


# On every kind of axis, with every kind of schedule.


def run_on_rank(setting: Setting, steps: int):
    """Curve and final weights; the forward runs of a layer in a step, for every layer of the rank."""
    run = start_run(setting, steps)
    runs: dict[str, int] = {}
    for stage in run.stages.values():
        assert stage.recompute.granularity == setting.memory.recompute_granularity
        for number, block in stage.layers.items():
            block.input_norm.register_forward_hook(lambda *_, n=number: runs.update({n: runs.get(n, 0) + 1}))
    curve = train_steps(run, setting, steps)
    rounds = steps * setting.global_batch // setting.micro_batch // run.mesh.dp.size
    return curve, main_weight_slices(run), {number: count / rounds for number, count in runs.items()}


TP, SP = {"tp": 2}, {"tp": 2, "sequence_parallel": True}
PP = {"pp": 2, "stage_layers": (3, 2)}
VIRTUAL = {"pp": 2, "per_virtual_stage": 1, "stage_layers": (1, 3, 1, 0)}
CASES = [  # model, kind, world, layout, the layers that run twice
    ("dropping", "selective", 2, TP, ""),
    ("dropping", "uniform, distributed", 2, TP, "01234"),
    ("plain", "block", 2, TP, "01"),
    ("dropping", "selective", 2, SP, ""),
    ("llama", "uniform", 2, SP, "01234"),
    ("dropping", "block", 2, {**PP, "schedule": "1f1b"}, "0134"),
    ("llama", "selective", 2, {**PP, "schedule": "1f1b"}, ""),
    ("dropping", "uniform", 2, {**PP, "schedule": "zb-h1"}, "01234"),
    ("dropping", "selective", 2, {**PP, "schedule": "zb-h1"}, ""),
    ("dropping", "block", 2, {**VIRTUAL, "schedule": "interleaved"}, "0124"),
    ("dropping", "uniform", 2, {"pp": 2, "schedule": "zb-v"}, "01234"),
    ("dropping", "uniform, distributed", 4, {**TP, **PP, "schedule": "zb-h1"}, "01234"),
    ("dropping", "selective", 4, {**SP, **PP, "schedule": "zb-h2"}, ""),
    ("dropping", "uniform", 2, {"micro_batch": 2}, "01234"),
]


@pytest.mark.parametrize(("name", "kind", "world", "layout", "twice"), CASES)
def test_every_layout_is_the_same_run(name, kind, world, layout, twice):
    setting = MODELS[name]
    steps = STEPS if world < 4 else 5
    expected, _, final = one_process(name, steps)
    results = on_ranks(world, run_on_rank, replace(setting, memory=KINDS[kind], **layout), steps)
    seen: dict[str, float] = {}
    for curve, ended, runs in results:
        pairs = [pair for step, reference in zip(curve, expected, strict=True) for pair in zip(step, reference, strict=True)]
        assert max(abs(a - b) / b for a, b in pairs) < TOLERANCE
        assert max_relative_error(final, ended) < TOLERANCE
        seen |= runs
    assert seen == {str(layer): 2.0 if str(layer) in twice else 1.0 for layer in range(5)}


# What the tests above are worth.


def test_another_mask_in_the_second_run_shows(monkeypatch):
    """A kernel whose generator is not put back: no error, only wrong gradients."""
    setting, original = replace(MODELS["fused"], global_batch=1), Recompute.from_config
    monkeypatch.setattr(Recompute, "from_config", lambda config, tp, draws: original(config, tp, draws=False))
    ((expected, norm),), ((loss, wrong),) = (
        trajectory(replace(setting, memory=m), 1)[0] for m in (MemoryConfig(), KINDS["uniform"])
    )
    assert loss == expected and abs(wrong - norm) / norm > 100 * TOLERANCE


def shares_of_another(setting: Setting, steps: int):
    """One rank joins its own share twice."""
    from megatron.parallel import recompute

    gather = recompute.all_gather
    recompute.all_gather = lambda x, axis: torch.cat([gather(x, axis)[: len(x)]] * axis.size)
    try:
        return run_on_rank(setting, steps)[0]
    finally:
        recompute.all_gather = gather


def test_another_ranks_share_of_activations_shows():
    setting = replace(MODELS["dropping"], memory=KINDS["uniform, distributed"], **TP)
    expected = one_process("dropping")[0][0]
    for curve in on_ranks(2, shares_of_another, setting, 1):
        assert curve[0][0] == pytest.approx(expected[0], rel=TOLERANCE)
        assert abs(curve[0][1] - expected[1]) / expected[1] > 100 * TOLERANCE
