"""Every pipeline is the same run: each schedule, cut and layout gives the loss, gradient norm and weights of one process."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial
from typing import Any

import pytest
import torch
from ranks import on_ranks
from reference import (
    GPT2,
    LLAMA,
    SEQ,
    HeldOutLoader,
    NamedSlices,
    Setting,
    main_weight_slices,
    max_relative_error,
    start_run,
    train_steps,
    trajectory,
    with_dropout,
    worst,
)
from torch.utils.checkpoint import checkpoint

from megatron.config.schema import OptimSettings
from megatron.parallel.spec import param_spec
from megatron.pipeline.schedules.schedule import SCHEDULES, Op, make_schedule
from megatron.pipeline.schedules.simulate import Costs, simulate
from megatron.train.evaluate import evaluate
from megatron.train.run import Run

STEPS = 20
TOLERANCE = 1e-5
# Adam divides small gradients by their own size, rounding included; a smaller step makes less of it.
ADAM = OptimSettings(lr=5e-3, clip_grad=1.0, lr_decay_style="cosine", lr_warmup_iters=4)
SGD = OptimSettings(optimizer="sgd", lr=0.1, lr_decay_style="constant")
MODELS = {
    "tied": Setting(replace(with_dropout(GPT2), num_layers=5), masked=True, optim=SGD),
    "tied adam": Setting(replace(with_dropout(GPT2), num_layers=5), masked=True, optim=ADAM),
    "untied": Setting(replace(LLAMA, num_layers=5), optim=ADAM),
    "untied sgd": Setting(replace(LLAMA, num_layers=5), optim=SGD),
    "deep": Setting(replace(LLAMA, num_layers=9), optim=ADAM),
}
LAYOUTS = {  # world, tp, pp, sequence parallel
    "pp 2": (2, 1, 2, False),
    "pp 4": (4, 1, 4, False),
    "pp 2 x dp 2": (4, 1, 2, False),
    "tp 2 x pp 2": (4, 2, 2, False),
    "tp 2 x pp 2, sequence": (4, 2, 2, True),
}
WORD = "embedding.word.weight"


@cache
def one_process(setting: Setting, steps: int = STEPS):
    return trajectory(setting, steps)


def setting_for_layout(setting: Setting, schedule: str, layout: str = "pp 2", **changes: Any) -> Setting:
    _, tp, pp, sequence_parallel = LAYOUTS[layout]
    virtual = 1 if schedule == "interleaved" else None  # layers of a virtual stage
    wanted = {"tp": tp, "pp": pp, "sequence_parallel": sequence_parallel, **changes}
    return replace(setting, schedule=schedule, per_virtual_stage=virtual, **wanted)


def pipeline_run(setting: Setting, steps: int):
    """Curve, initial and final weights, the copies of the word embedding after every step; peak of live activations."""
    run = start_run(setting, steps)
    initial, curve, copies, peaks = main_weight_slices(run), [], [], set()
    for _ in range(steps):
        curve += train_steps(run, setting, 1)
        copies.append([p.detach().clone() for b in run.optimizer.buffers for p in b.parameters if param_spec(p).name == WORD])
        peaks.add(run.pipeline.peak_in_flight)
    schedule = run.pipeline.schedule(setting.global_batch // setting.micro_batch // run.mesh.dp.size)
    assert peaks == {simulate(schedule, Costs()).peak_activations[run.mesh.pp.rank]}, f"{peaks} activations at once"
    assert leaves_nothing(run)
    return curve, initial, main_weight_slices(run), copies


def leaves_nothing(run: Run) -> bool:
    executor = run.pipeline
    return not (
        executor._in_flight
        or executor._inbox
        or executor._outbox
        or executor.channels._sending
        or executor.weight_grad_store.is_deferring
    )


def same_run(results, expected, initial: NamedSlices, final: NamedSlices, tolerance: float) -> None:
    for curve, begun, ended, _ in results:
        assert max_relative_error(initial, begun) == 0.0, "initial weights depend on the layout"
        assert worst(curve, expected) < TOLERANCE
        assert max_relative_error(final, ended) < tolerance


# The grid. Five layers do for all schedules but those with two stages on each of four ranks, which take nine. Where the untied
# are one process to the last bit they run with Adam, elsewhere with SGD.

TWO_STAGES = ("interleaved", "zb-v")
ALONE = ("pp 2", "pp 4")
CASES = [("tied", schedule, layout) for schedule in SCHEDULES for layout in LAYOUTS if layout != "tp 2 x pp 2"]
CASES += [("untied", schedule, layout) for schedule in SCHEDULES for layout in ALONE]
CASES = [case for case in CASES if not (case[2] == "pp 4" and case[1] in TWO_STAGES)]
CASES += [("untied sgd", schedule, layout) for schedule in SCHEDULES for layout in ("pp 2 x dp 2", "tp 2 x pp 2")]
CASES += [("deep", schedule, "pp 4") for schedule in TWO_STAGES]


@pytest.mark.parametrize(("name", "schedule", "layout"), CASES)
def test_every_schedule_is_the_same_run(name, schedule, layout):
    setting = MODELS[name]
    world = LAYOUTS[layout][0]
    steps = STEPS if world == 2 else STEPS // 2  # four ranks on two cores take their time
    expected, initial, final = one_process(setting, steps)
    results = on_ranks(world, pipeline_run, setting_for_layout(setting, schedule, layout), steps)
    # Adam divides noise by noise where a gradient is zero but for rounding: what SGD's weights show, its own need not.
    same_run(results, expected, initial, final, TOLERANCE if setting.optim is SGD else 1e-2)
    if name in ("untied", "deep"):  # the same sums in the same order
        assert all(curve == expected and max_relative_error(final, ended) == 0.0 for curve, _, ended, _ in results)
    if name == "tied":
        equal_copies(results, pp=LAYOUTS[layout][2], tp=LAYOUTS[layout][1], v_shaped=schedule == "zb-v")


def equal_copies(results, *, pp: int, tp: int, v_shaped: bool) -> None:
    """The first and the last stage's word embedding are equal to the last bit after every step, and so are replicas'."""
    held = [copies for _, _, _, copies in results]
    for step in range(len(held[0])):
        by_tp: dict[int, list[torch.Tensor]] = {}
        for rank, copies in enumerate(held):
            assert len(copies[step]) <= 1
            for copy in copies[step]:
                by_tp.setdefault(rank % tp, []).append(copy)
        replicas = len(results) // (tp * pp)
        for copies in by_tp.values():
            assert len(copies) == replicas * (1 if v_shaped or pp == 1 else 2)
            assert all(torch.equal(copies[0], copy) for copy in copies[1:]), f"copies differ after step {step}"


@pytest.mark.parametrize("layout", ["pp 2 x dp 2", "tp 2 x pp 2, sequence"])
def test_tied_copies_stay_equal_with_adam(layout):
    setting = MODELS["tied adam"]
    expected, initial, final = one_process(setting)
    world, tp, pp, _ = LAYOUTS[layout]
    results = on_ranks(world, pipeline_run, setting_for_layout(setting, "1f1b", layout), STEPS)
    same_run(results, expected, initial, final, 1e-2)
    equal_copies(results, pp=pp, tp=tp, v_shaped=False)


FEW = [(schedule, pp, m) for schedule in SCHEDULES for pp, m in ((4, 1), (4, 3))]


@pytest.mark.parametrize(("schedule", "pp", "micro_batches"), [*FEW, ("interleaved", 3, 4), ("zb-v", 3, 2)])
def test_fewer_micro_batches_than_stages(schedule, pp, micro_batches):
    """Nine layers on three and four ranks: to the last bit one process, for every schedule."""
    setting = replace(MODELS["deep"], global_batch=micro_batches)
    expected, _, final = one_process(setting, 3)
    for curve, _, ended, _ in on_ranks(pp, pipeline_run, setting_for_layout(setting, schedule, pp=pp), 3):
        assert curve == expected and max_relative_error(final, ended) == 0.0


CUTS = [  # schedule, layout, layers of each stage
    ("1f1b", "pp 2", (0, 5)),
    ("zb-h1", "pp 4", (0, 2, 3, 0)),
    ("interleaved", "pp 2", (0, 1, 3, 1)),
    ("zb-v", "pp 2", (0, 3, 2, 0)),
    ("1f1b", "tp 2 x pp 2, sequence", (5, 0)),
    ("gpipe", "tp 2 x pp 2", (0, 5)),
]


@pytest.mark.parametrize(("schedule", "layout", "layers"), CUTS)
def test_prescribed_stages_equal_one_process(schedule, layout, layers):
    """Also those that leave the ends of the model without layers."""
    setting = MODELS["tied"]
    expected, initial, final = one_process(setting, 5)
    wanted = setting_for_layout(setting, schedule, layout, stage_layers=layers)
    same_run(on_ranks(LAYOUTS[layout][0], pipeline_run, wanted, 5), expected, initial, final, TOLERANCE)


SPLITS = [
    ("1f1b", {"decoder_first_pipeline_num_layers": 2}),
    ("zb-h1", {"account_for_loss_in_pipeline_split": True}),
    ("interleaved", {"pipeline_model_parallel_layout": "Et|tt|tt|L"}),
]


@pytest.mark.parametrize(("schedule", "split"), SPLITS)
def test_megatrons_ways_to_cut(schedule, split):
    """With a learning rate of its own for the tied matrix on both of its stages."""
    setting = replace(MODELS["tied"], optim=replace(SGD, decoupled_lr=0.3))
    expected, initial, final = one_process(setting, 2)
    wanted = replace(setting_for_layout(setting, schedule, split=tuple(split.items())), per_virtual_stage=None)
    same_run(on_ranks(2, pipeline_run, wanted, 2), expected, initial, final, TOLERANCE)


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_embedding_and_output_layer_learn_at_their_own_rate(name):
    """One step of SGD: what they move is as many times as much, and all else the same."""
    plain = OptimSettings(
        optimizer="sgd", lr=0.01, lr_decay_style="constant", sgd_momentum=0.0, weight_decay=0.0, clip_grad=0.0
    )
    setting = replace(MODELS[name], optim=plain)
    _, begin, end = one_process(setting, 1)
    _, _, decoupled = one_process(replace(setting, optim=replace(plain, decoupled_lr=0.04)), 1)
    for key, (_, first) in begin.items():
        times = 4.0 if key in (WORD, "head.weight") else 1.0
        torch.testing.assert_close(decoupled[key][1] - first, times * (end[key][1] - first), rtol=1e-3, atol=1e-7)


# Evaluation.


def train_and_evaluate(setting: Setting, between: bool):
    """Two steps, and between them an evaluation or nothing."""
    run = start_run(setting, 2)
    curve, loss = train_steps(run, setting, 1), 0.0
    if between:
        before = [b.grads.clone() for b in run.optimizer.buffers]
        loader = HeldOutLoader(run, setting)
        loss, _ = evaluate(run.pipeline, loader, run.mesh, steps=2, global_batch_size=setting.global_batch)
        assert all(torch.equal(a, b.grads) for a, b in zip(before, run.optimizer.buffers, strict=True))
        assert all(stage.training for stage in run.stages.values()) and run.pipeline.peak_in_flight == 0
        assert leaves_nothing(run)
    return curve + train_steps(run, setting, 1), loss, main_weight_slices(run)


EVALUATIONS = [("1f1b", "pp 2"), ("interleaved", "pp 2"), ("zb-v", "pp 2 x dp 2"), ("zb-h1", "tp 2 x pp 2, sequence")]


@pytest.mark.parametrize(("schedule", "layout"), EVALUATIONS)
def test_evaluation_is_that_of_one_process_and_leaves_no_trace(schedule, layout):
    """The model drops out in training and loses a third of its tokens to the mask."""
    setting = MODELS["tied"]
    _, expected, _ = train_and_evaluate(setting, True)
    wanted, world = setting_for_layout(setting, schedule, layout), LAYOUTS[layout][0]
    results, without = on_ranks(world, train_and_evaluate, wanted, True), on_ranks(world, train_and_evaluate, wanted, False)
    for (curve, loss, ended), (undisturbed, _, ended_without) in zip(results, without, strict=True):
        assert abs(loss - expected) / expected < TOLERANCE
        assert curve == undisturbed
        assert all(torch.equal(values, ended_without[name][1]) for name, (_, values) in ended.items())


# Recomputation, precision, and what travels.


def train_with_recomputation(setting: Setting, steps: int):
    """The run with every layer's forward pass run again in its backward."""
    run = start_run(setting, steps)
    calls = []
    for stage in run.stages.values():
        for block in stage.layers.values():
            block.forward = partial(checkpoint, counting_calls(block.forward, calls), use_reentrant=False)
    curve = train_steps(run, setting, steps)
    forwards = sum(len(stage.layers) for stage in run.stages.values()) * steps * setting.global_batch // run.mesh.dp.size
    assert len(calls) == 2 * forwards
    return curve, main_weight_slices(run)


def counting_calls(forward, calls: list[None]):
    def call(*args):
        calls.append(None)
        return forward(*args)

    return call


@pytest.mark.parametrize(
    ("schedule", "layout"), [("1f1b", "pp 2"), ("zb-h1", "pp 2"), ("zb-v", "pp 2"), ("zb-h1", "tp 2 x pp 2, sequence")]
)
def test_recomputation_changes_nothing(schedule, layout):
    setting, world = setting_for_layout(MODELS["tied"], schedule, layout), LAYOUTS[layout][0]
    for (curve, ended), plain in zip(
        on_ranks(world, train_with_recomputation, setting, 3), on_ranks(world, trajectory, setting, 3), strict=True
    ):
        assert curve == plain[0]
        assert all(torch.equal(values, plain[2][name][1]) for name, (_, values) in ended.items())


@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1", "zb-v"])
def test_bf16_follows_one_process(schedule):
    """Untied, the sums are the same in the same order, also in bf16."""
    setting = replace(MODELS["untied"], bf16=True)
    expected, _, final = one_process(setting)
    assert 0 < worst([step[:1] for step in expected], [step[:1] for step in one_process(MODELS["untied"])[0]]) < 0.03
    for curve, _, ended, _ in on_ranks(2, pipeline_run, setting_for_layout(setting, schedule), STEPS):
        assert curve == expected and max_relative_error(final, ended) == 0.0
    tied = replace(MODELS["tied"], bf16=True)
    expected = one_process(tied, 8)[0]
    for curve, _, _, _ in on_ranks(2, pipeline_run, setting_for_layout(tied, schedule), 8):
        assert max(abs(a[0] - b[0]) / b[0] for a, b in zip(curve, expected, strict=True)) < 0.01


def bytes_sent(setting: Setting) -> int:
    run = start_run(setting, 1)
    send, sent = run.pipeline.channels.send, []
    run.pipeline.channels.send = lambda x, peer, number: (sent.append(x.nbytes), send(x, peer, number))
    train_steps(run, setting, 1)
    return sum(sent)


@pytest.mark.parametrize("bf16", [False, True])
def test_stages_send_each_activation_once(bf16):
    """Under sequence parallelism each rank of tp sends its own part of the sequence, once; otherwise each sends all."""
    setting = replace(MODELS["tied"], bf16=bf16)
    whole = setting.global_batch * SEQ * 32 * (2 if bf16 else 4)  # of one direction, over one boundary
    assert on_ranks(2, bytes_sent, setting_for_layout(setting, "1f1b")) == [whole] * 2
    assert on_ranks(4, bytes_sent, setting_for_layout(setting, "1f1b", "tp 2 x pp 2")) == [whole] * 4
    assert on_ranks(4, bytes_sent, setting_for_layout(setting, "zb-h1", "tp 2 x pp 2, sequence")) == [whole // 2] * 4
    # Down and up: each rank sends hidden states over one boundary and gradients over one; the turn at the end is free.
    assert on_ranks(2, bytes_sent, setting_for_layout(setting, "zb-v")) == [2 * whole] * 2
    assert on_ranks(2, bytes_sent, setting_for_layout(setting, "interleaved")) == [3 * whole] * 2


def broken_run(setting: Setting, fault: str):
    """The first step's norm with one thing wrong on the last rank; and whether the tied copies are still equal after it."""
    run = start_run(setting, 1)
    executor = run.pipeline
    if fault == "one stage's gradient 1 % too large" and run.mesh.world.last:
        backward = executor._backward
        executor._handlers[Op.B] = lambda action, grad: backward(action, grad * 1.01)
    if fault == "copies not summed":
        run.optimizer._sum_over = lambda axis, views: None
    return train_steps(run, setting, 1)[0], main_weight_slices(run)


@pytest.mark.parametrize("fault", ["", "one stage's gradient 1 % too large", "copies not summed"])
def test_negative_controls(fault):
    """A fault of each kind exceeds the tolerances above."""
    setting = MODELS["tied"]
    norm = one_process(setting, 1)[0][0][1]
    first, second = on_ranks(2, broken_run, setting_for_layout(setting, "1f1b"), fault)
    error = abs(first[0][1] - norm) / norm
    equal = torch.equal(first[1][WORD][1], second[1][WORD][1])
    assert (error < TOLERANCE) == (not fault) and (error > 100 * TOLERANCE) == bool(fault)
    assert equal == (fault != "copies not summed")


def test_every_schedule_of_one_stage_is_the_plain_run():
    """Without a pipeline every schedule is the plain run: order and result."""
    setting = MODELS["untied"]
    expected = one_process(setting, 3)[0]
    for name in ("gpipe", "1f1b", "zb-h1", "zb-h2"):
        assert trajectory(replace(setting, schedule=name), 3)[0] == expected
        assert make_schedule(name, 1, 4).ranks == 1
