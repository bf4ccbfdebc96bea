"""Context parallelism is the same run: loss, gradient norm and weights of one process, with every kind of mask."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from ranks import on_ranks
from reference import (
    GPT2,
    LLAMA,
    HeldOutLoader,
    Setting,
    gradient_slices,
    max_relative_error,
    micro_batches,
    start_run,
    train_steps,
    trajectory,
    with_dropout,
    worst,
)

from megatron.config.schema import MemoryConfig, OptimSettings
from megatron.parallel import ring
from megatron.train.evaluate import evaluate

STEPS = 6
TOLERANCE = 1e-5
# Adam divides small gradients by their own size, rounding included; a smaller step makes less of it.
ADAM = OptimSettings(lr=5e-3, clip_grad=1.0, lr_decay_style="cosine", lr_warmup_iters=4)
SGD = OptimSettings(optimizer="sgd", lr=0.1, lr_decay_style="constant")
MODELS = {
    "learned positions": Setting(GPT2, optim=ADAM),
    "learned positions, dropout, masked, documents": Setting(with_dropout(GPT2), masked=True, documents=True, optim=SGD),
    "rope, grouped queries": Setting(LLAMA, optim=ADAM),
    "rope, grouped queries, dropout, masked, documents": Setting(with_dropout(LLAMA), masked=True, documents=True, optim=ADAM),
}
LAYOUTS = {  # world, and what differs from one process
    "cp 2": (2, {"cp": 2}),
    "cp 4": (4, {"cp": 4, "micro_batch": 2}),
    "cp 2 x tp 2": (4, {"cp": 2, "tp": 2, "micro_batch": 2}),
    "cp 2 x tp 2, sequence": (4, {"cp": 2, "tp": 2, "sequence_parallel": True, "micro_batch": 2}),
    "cp 2 x pp 2": (4, {"cp": 2, "pp": 2}),
    "cp 2 x pp 2, zb-h1": (4, {"cp": 2, "pp": 2, "schedule": "zb-h1", "micro_batch": 2}),
    "cp 2 x dp 2": (4, {"cp": 2}),
}


@cache
def one_process(setting: Setting, steps: int = STEPS):
    return trajectory(setting, steps)


CASES = [
    *((name, layout) for name in MODELS if "documents" in name for layout in ("cp 2", "cp 4", "cp 2 x dp 2")),
    ("learned positions", "cp 4"),
    ("learned positions, dropout, masked, documents", "cp 2 x tp 2, sequence"),
    ("learned positions, dropout, masked, documents", "cp 2 x pp 2"),
    ("rope, grouped queries", "cp 2"),
    ("rope, grouped queries, dropout, masked, documents", "cp 2 x tp 2"),
    ("rope, grouped queries, dropout, masked, documents", "cp 2 x pp 2, zb-h1"),
]


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_every_layout_is_the_same_run(name, layout):
    setting, (world, changes) = MODELS[name], LAYOUTS[layout]
    expected, initial, final = one_process(setting)
    assert expected[-1][0] < 0.95 * expected[0][0]
    for curve, begun, ended in on_ranks(world, trajectory, replace(setting, **changes), STEPS):
        assert max_relative_error(initial, begun) == 0.0, "initial weights depend on the layout"
        assert worst(curve, expected) < TOLERANCE
        # Adam divides noise by noise where a gradient is zero but for rounding: what SGD's weights show, its own need not.
        assert max_relative_error(final, ended) < (TOLERANCE if setting.optim is SGD else 1e-2)


def test_the_masks_matter():
    """The settings above switch on masks that change the run far more than the tolerance allows."""
    setting = MODELS["learned positions, dropout, masked, documents"]
    expected, _, _ = one_process(setting)
    for change in ({"documents": False}, {"masked": False}, {"model": GPT2}):
        assert worst(one_process(replace(setting, **change))[0], expected) > 100 * TOLERANCE


@pytest.mark.parametrize("cp", [2, 4])
def test_the_mean_of_micro_batch_means(cp):
    """A micro-batch's mean is over the tokens that count on all of its ranks."""
    setting = replace(MODELS["learned positions"], masked=True, micro_batch=2, loss_average="micro-batch")
    expected, _, _ = one_process(setting, 5)
    assert worst(one_process(replace(setting, loss_average="token"), 5)[0], expected) > 100 * TOLERANCE
    for curve, _, _ in on_ranks(cp, trajectory, replace(setting, cp=cp), 5):
        assert worst(curve, expected) < TOLERANCE


def first_gradients(setting: Setting, fault: bool = False):
    """Return the gradients of the first step. fault: the last rank loses those of its keys and values."""
    run, backward = start_run(setting, 1), ring._Ring.backward

    def losing(ctx, *grads):
        grad_q, grad_k, grad_v, _ = backward(ctx, *grads)
        return grad_q, torch.zeros_like(grad_k), torch.zeros_like(grad_v), None

    if fault and run.mesh.world.last:
        ring._Ring.backward = staticmethod(losing)
    try:
        run.step(micro_batches(setting, 127, 0, run.mesh.dp.rank, run.mesh.dp.size), run.state)
    finally:
        ring._Ring.backward = staticmethod(backward)
    return gradient_slices(run)


@pytest.mark.parametrize("layout", ["cp 4", "cp 2 x tp 2, sequence"])
@pytest.mark.parametrize("fault", [False, True])
def test_gradients_of_every_parameter(layout, fault):
    """And what one rank's loss of the gradients of its keys and values does to them."""
    setting = MODELS["rope, grouped queries, dropout, masked, documents"]
    setting = replace(setting, optim=replace(setting.optim, clip_grad=0.0))
    whole, (world, changes) = first_gradients(setting), LAYOUTS[layout]
    parts = on_ranks(world, first_gradients, replace(setting, **changes), fault)
    assert all(set(part) == set(whole) for part in parts)
    errors = [max_relative_error(whole, part) for part in parts]
    assert max(errors) > 1000 * TOLERANCE if fault else max(errors) < TOLERANCE


def evaluate_after_a_step(setting: Setting) -> float:
    run = start_run(setting, 2)
    train_steps(run, setting, 1)
    return evaluate(run.pipeline, HeldOutLoader(run, setting), run.mesh, steps=2, global_batch_size=setting.global_batch)[0]


@pytest.mark.parametrize("layout", ["cp 4", "cp 2 x pp 2"])
def test_evaluation_is_that_of_one_process(layout):
    setting, (world, changes) = MODELS["learned positions, dropout, masked, documents"], LAYOUTS[layout]
    expected = evaluate_after_a_step(setting)
    for loss in on_ranks(world, evaluate_after_a_step, replace(setting, **changes)):
        assert abs(loss - expected) / expected < TOLERANCE


@pytest.mark.parametrize("memory", [MemoryConfig("selective"), MemoryConfig("full", "uniform")], ids=["selective", "full"])
@pytest.mark.parametrize("layout", ["cp 2", "cp 2 x pp 2, zb-h1"])
def test_recomputation_goes_around_again(layout, memory):
    """Layers that are run again communicate again, and change no bit."""
    world, changes = LAYOUTS[layout]
    setting = replace(MODELS["rope, grouped queries, dropout, masked, documents"], **changes)
    plain, again = (on_ranks(world, trajectory, s, 3) for s in (setting, replace(setting, memory=memory)))
    for (curve, _, ended), (expected, _, final) in zip(again, plain, strict=True):
        assert curve == expected and max_relative_error(final, ended) == 0.0


def bf16_losses(setting: Setting):
    return [loss for loss, _ in trajectory(replace(setting, bf16=True), STEPS)[0]]


def test_bf16_follows_fp32():
    setting = MODELS["rope, grouped queries"]
    expected = [loss for loss, _ in one_process(setting)[0]]
    for losses in on_ranks(2, bf16_losses, replace(setting, cp=2)):
        assert 0 < max(abs(a - b) / b for a, b in zip(losses, expected, strict=True)) < 0.03
