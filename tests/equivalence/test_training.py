"""Any layout is the same run: loss, gradient norm and weights of every layout equal those of one process."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from ranks import on_ranks
from reference import (
    GPT2,
    LLAMA,
    SEQ,
    Setting,
    accumulate_gradients,
    gradient_slices,
    max_relative_error,
    micro_batches,
    start_run,
    trajectory,
    with_dropout,
    worst,
)

from megatron.config.schema import OptimSettings

STEPS = 20
TOLERANCE = 1e-5

LAYOUTS = [  # world, tp, sequence parallel, micro-batch
    (2, 1, False, 1),
    (2, 2, False, 2),
    (2, 2, True, 4),
    (4, 1, False, 1),
    (4, 2, False, 2),
    (4, 2, True, 1),
    (4, 4, False, 2),
    (4, 4, True, 4),
]
MODELS = {
    "gpt2": Setting(GPT2),
    "gpt2 dropout": Setting(with_dropout(GPT2)),
    "gpt2 masked": Setting(GPT2, masked=True),
    "gpt2 sgd": Setting(GPT2, optim=OptimSettings(optimizer="sgd", lr=0.1, lr_decay_style="constant")),
    "llama": Setting(LLAMA),
    "llama dropout masked": Setting(with_dropout(LLAMA), masked=True),
}


@cache
def one_process(name: str, steps: int = STEPS):
    return trajectory(MODELS[name], steps)


@pytest.mark.parametrize("name", MODELS)
def test_the_reference_learns(name):
    curve, _, _ = one_process(name)
    assert curve[-1][0] < 0.75 * curve[0][0]


CASES = [
    (name, *layout)
    for name in MODELS
    for layout in LAYOUTS
    if MODELS[name].model.num_query_groups is None or MODELS[name].model.num_query_groups % layout[1] == 0
]


@pytest.mark.parametrize(("name", "world", "tp", "sequence_parallel", "micro_batch"), CASES)
def test_every_layout_is_the_same_run(name, world, tp, sequence_parallel, micro_batch):
    setting = replace(MODELS[name], tp=tp, sequence_parallel=sequence_parallel, micro_batch=micro_batch)
    steps = STEPS if world < 4 else STEPS // 2  # four ranks on two cores take their time
    expected, initial, final = one_process(name, steps)
    for curve, begun, ended in on_ranks(world, trajectory, setting, steps):
        assert max_relative_error(initial, begun) == 0.0, "initial weights depend on the layout"
        assert worst(curve, expected) < TOLERANCE
        # Adam divides noise by noise where a gradient is zero but for rounding, as that of the keys' biases is.
        assert max_relative_error(final, ended) < (TOLERANCE if name == "gpt2 sgd" else 1e-2)


@pytest.mark.parametrize("micro_batch", [2, 4])
def test_accumulation_is_the_same_run(micro_batch):
    expected, _, _ = one_process("gpt2 dropout")
    curve, _, _ = trajectory(replace(MODELS["gpt2 dropout"], micro_batch=micro_batch), STEPS)
    assert worst(curve, expected) < TOLERANCE


def test_mean_of_micro_batch_means_is_another_run():
    """Megatron-LM's average weighs tokens unevenly when micro-batches count unequally many; the default does not."""
    setting = replace(MODELS["gpt2 masked"], loss_average="micro-batch")
    curve, _, _ = trajectory(setting, 5)
    assert worst(curve, one_process("gpt2 masked")[0][:5]) > 1e-3
    plain = replace(MODELS["gpt2"], loss_average="micro-batch")
    assert worst(trajectory(plain, 5)[0], trajectory(MODELS["gpt2"], 5)[0]) < TOLERANCE


def scaled_gradient(setting: Setting, steps: int):
    """A trajectory in which the last rank's gradients are 1 % too large."""
    run = start_run(setting, steps)
    curve = []
    for _ in range(steps):
        accumulate_gradients(run, setting)
        if run.mesh.world.last:
            for buffer in run.optimizer.buffers:
                buffer.grads.mul_(1.01)
        report = run.optimizer.step(lr=1e-2, weight_decay=0.0, scale=1.0)
        run.state.consumed_samples += setting.global_batch
        curve.append(report.grad_norm)
    return curve


@pytest.mark.parametrize("tp", [1, 2])
def test_negative_control_a_wrong_gradient_is_seen(tp):
    """1 % on one of two ranks moves the norm far beyond the tolerance that the layouts are held to."""
    expected = one_process("gpt2")[0][0][1]
    for norms in on_ranks(2, scaled_gradient, replace(MODELS["gpt2"], tp=tp), 1):
        assert abs(norms[0] - expected) / expected > 100 * TOLERANCE


def first_gradients(setting: Setting):
    run = start_run(setting, 1)
    run.step(micro_batches(setting, 127, 0, run.mesh.dp.rank, run.mesh.dp.size), run.state)
    return gradient_slices(run)


@pytest.mark.parametrize(("world", "tp", "sequence_parallel"), [(2, 2, True), (4, 2, True), (4, 4, False)])
def test_gradients_of_every_parameter(world, tp, sequence_parallel):
    setting = replace(MODELS["gpt2 dropout"], optim=replace(MODELS["gpt2"].optim, clip_grad=0.0))
    whole = first_gradients(setting)
    layout = replace(setting, tp=tp, sequence_parallel=sequence_parallel)
    for part in on_ranks(world, first_gradients, layout):
        assert set(part) == set(whole)
        assert max_relative_error(whole, part) < TOLERANCE


def bf16_curve(setting: Setting):
    return trajectory(replace(setting, bf16=True), STEPS)[0]


def test_bf16_follows_fp32():
    """bf16 compute with fp32 main weights and gradients stays near fp32, on one process and with tensor parallelism."""
    expected, _, _ = one_process("gpt2")
    alone = bf16_curve(MODELS["gpt2"])
    spread = max(abs(a[0] - b[0]) / b[0] for a, b in zip(alone, expected, strict=True))
    assert 0 < spread < 0.03
    for curve in on_ranks(2, bf16_curve, replace(MODELS["gpt2"], tp=2, sequence_parallel=True)):
        assert max(abs(a[0] - b[0]) / b[0] for a, b in zip(curve, alone, strict=True)) < 0.03


def test_a_run_can_be_built_twice_in_one_process():
    first, second = (start_run(MODELS["gpt2"], 2) for _ in range(2))
    assert first.stages[0] is not second.stages[0]
    for a, b in zip(first.stages[0].parameters(), second.stages[0].parameters(), strict=True):
        assert torch.equal(a, b)
    assert first.config.data.seq_length == SEQ
