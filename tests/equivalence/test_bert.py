"""BERT on any layout is the same run: both losses, gradient norm and weights equal those of one process."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pytest
import torch
from ranks import on_ranks
from reference import (
    BERT,
    HeldOutLoader,
    Setting,
    gradient_slices,
    main_weight_slices,
    max_relative_error,
    micro_batches,
    start_run,
    train_steps,
    trajectory,
    with_dropout,
    worst,
)

from megatron.checkpoint.find import find_checkpoint
from megatron.checkpoint.load import load
from megatron.checkpoint.save import save
from megatron.config.command_line.saved import to_json
from megatron.config.schema import MemoryConfig, OptimSettings, PrecisionConfig, RunConfig
from megatron.parallel import cross_entropy
from megatron.parallel.spec import param_spec
from megatron.train.evaluate import evaluate

STEPS = 6
TOLERANCE = 1e-5
SGD = OptimSettings(optimizer="sgd", lr=0.2, lr_decay_style="constant", clip_grad=1.0)
ADAM = OptimSettings(lr=5e-3, clip_grad=1.0, lr_decay_style="cosine", lr_warmup_iters=4)
WORD = "embedding.word.weight"


@dataclass(frozen=True)
class ShardedSetting(Setting):
    """With the distributed optimizer in small buckets, and both of its overlaps."""

    sharded: bool = False

    def config(self, world: int, steps: int) -> RunConfig:
        config = super().config(world, steps)
        own = dict(overlap_grad_reduce=self.sharded, overlap_param_gather=self.sharded, ddp_bucket_size=3000)
        return replace(config, layout=replace(config.layout, use_distributed_optimizer=self.sharded, **own))


FOUR = replace(BERT, num_layers=4)
MODELS = {
    "binary head, dropout": ShardedSetting(with_dropout(FOUR), optim=SGD),
    "binary head": ShardedSetting(FOUR, optim=SGD),
    "words alone, dropout": ShardedSetting(replace(with_dropout(FOUR), bert_binary_head=False), optim=SGD),
    "words alone": ShardedSetting(replace(FOUR, bert_binary_head=False), optim=SGD),
    "adam": ShardedSetting(with_dropout(FOUR), optim=ADAM),
}
LAYOUTS = {  # world, and what differs from one process
    "dp 2": (2, {}),
    "dp 2, micro-batches of 2": (2, dict(micro_batch=2)),
    "tp 2": (2, dict(tp=2, micro_batch=2)),
    "tp 2, sequence": (2, dict(tp=2, sequence_parallel=True)),
    "pp 2, 1f1b": (2, dict(pp=2, schedule="1f1b")),
    "pp 2, interleaved": (2, dict(pp=2, schedule="interleaved", per_virtual_stage=1)),
    "pp 2, zb-h1": (2, dict(pp=2, schedule="zb-h1")),
    "pp 2, zb-v": (2, dict(pp=2, schedule="zb-v")),
    "cp 2": (2, dict(cp=2)),
    "cp 2 x tp 2, sequence": (4, dict(cp=2, tp=2, sequence_parallel=True, micro_batch=2)),
    "tp 2 x pp 2": (4, dict(tp=2, pp=2)),
    "tp 2 x pp 2, sequence, zb-h1": (4, dict(tp=2, pp=2, sequence_parallel=True, schedule="zb-h1")),
    "dp 2, sharded, overlapped": (2, dict(sharded=True)),
    "dp 2, recomputed": (2, dict(memory=MemoryConfig("full", "uniform"))),
    "tp 2, recomputed in part": (2, dict(tp=2, memory=MemoryConfig("selective"))),
}


@cache
def one_process(setting: Setting, steps: int = STEPS):
    return trajectory(setting, steps)


@pytest.mark.parametrize("name", MODELS)
def test_the_reference_learns(name):
    """Both of what it is taught; the order of the segments shows in their tokens."""
    curve, _, _ = trajectory(MODELS[name], 40) if name == "adam" else one_process(MODELS[name])
    assert all(len(step) == (3 if MODELS[name].model.bert_binary_head else 2) for step in curve)
    assert curve[-1][0] < (0.6 if name == "adam" else 0.95) * curve[0][0]


def bert_run(setting: Setting, steps: int):
    """As `trajectory`; and the copies of the word embedding after every step."""
    run = start_run(setting, steps)
    initial, curve, copies = main_weight_slices(run), [], []
    for _ in range(steps):
        curve += train_steps(run, setting, 1)
        run.optimizer.gatherer.finish()
        held = {p for stage in run.stages.values() for p in stage.parameters() if param_spec(p).name == WORD}
        copies.append([p.detach().clone() for p in held])
    return curve, initial, main_weight_slices(run), copies


# With dropout everything, without it those that differ most, and with Adam a few.
CASES = [(name, layout) for name in ("binary head, dropout",) for layout in LAYOUTS]
CASES += [("words alone, dropout", layout) for layout in ("tp 2, sequence", "pp 2, zb-v", "cp 2", "dp 2, micro-batches of 2")]
CASES += [("words alone", layout) for layout in ("tp 2 x pp 2, sequence, zb-h1", "dp 2, sharded, overlapped")]
CASES += [("binary head", layout) for layout in ("tp 2", "pp 2, interleaved", "cp 2")]
CASES += [("adam", layout) for layout in ("dp 2, sharded, overlapped", "tp 2, sequence", "pp 2, 1f1b")]


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_every_layout_is_the_same_run(name, layout):
    setting, (world, changes) = MODELS[name], LAYOUTS[layout]
    expected, initial, final = one_process(setting)
    results = on_ranks(world, bert_run, replace(setting, **changes), STEPS)
    for curve, begun, ended, _ in results:
        assert max_relative_error(initial, begun) == 0.0, "initial weights depend on the layout"
        assert worst(curve, expected) < TOLERANCE
        # Adam divides noise by noise where a gradient is zero but for rounding: what SGD's weights show, its own need not.
        assert max_relative_error(final, ended) < (TOLERANCE if setting.optim is SGD else 1e-2)
    if changes.get("pp") and changes.get("tp", 1) == 1:
        for step in range(STEPS):
            held = [copy for *_, copies in results for copy in copies[step]]
            assert len(held) == (1 if changes["schedule"] == "zb-v" else 2)
            assert all(torch.equal(held[0], copy) for copy in held), f"the tied copies differ after step {step}"


def test_the_masks_and_the_dropout_matter():
    """The settings above switch on masks and dropout that change the run far more than the tolerance allows."""
    expected = one_process(MODELS["binary head, dropout"], 3)[0]
    assert worst(trajectory(MODELS["binary head"], 3)[0], expected) > 100 * TOLERANCE
    words = [step[:1] for step in trajectory(MODELS["words alone, dropout"], 3)[0]]
    assert worst(words, [step[:1] for step in expected]) > 100 * TOLERANCE


@pytest.mark.parametrize("layout", ["one", "dp 2", "cp 2"])
def test_the_mean_of_micro_batch_means(layout):
    """Its words weigh otherwise, the order of a sample as much as ever; on every layout."""
    setting = replace(MODELS["binary head, dropout"], micro_batch=2, loss_average="micro-batch")
    expected, _, _ = one_process(setting, 5)
    by_token, _, _ = one_process(replace(setting, loss_average="token"), 5)
    assert worst(expected, by_token) > 100 * TOLERANCE and expected[0][2] == pytest.approx(by_token[0][2], rel=1e-6)
    if layout != "one":
        for curve, *_ in on_ranks(2, trajectory, replace(setting, **LAYOUTS[layout][1]), 5):
            assert worst(curve, expected) < TOLERANCE


def first_gradients(setting: Setting):
    run = start_run(setting, 1)
    run.step(micro_batches(setting, 127, 0, run.mesh.dp.rank, run.mesh.dp.size), run.state)
    return gradient_slices(run)


@pytest.mark.parametrize("layout", ["tp 2, sequence", "cp 2", "pp 2, 1f1b", "tp 2 x pp 2"])
def test_gradients_of_every_parameter(layout):
    setting = replace(MODELS["binary head, dropout"], optim=replace(SGD, clip_grad=0.0))
    whole, (world, changes) = first_gradients(setting), LAYOUTS[layout]
    found = on_ranks(world, first_gradients, replace(setting, **changes))
    assert set().union(*found) == set(whole)
    assert max(max_relative_error(whole, part) for part in found) < TOLERANCE


@pytest.mark.parametrize("layout", ["tp 2, sequence", "pp 2, zb-h1"])
@pytest.mark.parametrize("precision", [PrecisionConfig(bf16=True), PrecisionConfig(fp16=True, initial_loss_scale=2.0**12)])
def test_16_bits_follow_fp32(layout, precision):
    """On one process near fp32, and in parallel near one process."""
    setting = replace(MODELS["binary head, dropout"], precision=precision)
    expected, alone = one_process(MODELS["binary head, dropout"])[0], one_process(setting)[0]
    apart = max(
        abs(a - b) / b for got, want in zip(alone, expected, strict=True) for a, b in zip(got[::2], want[::2], strict=True)
    )
    assert 0 < apart < 0.02
    for curve, *_ in on_ranks(2, trajectory, replace(setting, **LAYOUTS[layout][1]), STEPS):
        assert max(abs(a[i] - b[i]) / b[i] for a, b in zip(curve, alone, strict=True) for i in (0, 2)) < 0.02


def evaluate_fresh_run(setting: Setting):
    run = start_run(setting, 1)
    return evaluate(run.pipeline, HeldOutLoader(run, setting), run.mesh, steps=2, global_batch_size=setting.global_batch)


@pytest.mark.parametrize("layout", ["dp 2", "tp 2, sequence", "pp 2, zb-v", "cp 2"])
def test_evaluation_gives_both_losses(layout):
    setting, (world, changes) = MODELS["binary head, dropout"], LAYOUTS[layout]
    expected = evaluate_fresh_run(setting)
    assert expected[1] == pytest.approx(0.69, abs=0.2)
    for losses in on_ranks(world, evaluate_fresh_run, replace(setting, **changes)):
        assert losses == pytest.approx(expected, rel=TOLERANCE)


def train_and_save(setting: Setting, root: str):
    run = start_run(setting, 8)
    train_steps(run, setting, 3)
    save(Path(root), 3, run.parts(), run.mesh, config=to_json(run.config))
    return train_steps(run, setting, 5)


def load_and_train(setting: Setting, root: str):
    run = start_run(setting, 8)
    loaded = load(find_checkpoint(Path(root)), run.parts(), run.mesh)
    assert loaded.iteration == 3 and not loaded.missing and not loaded.unexpected
    return train_steps(run, setting, 5)


def test_a_run_goes_on_on_another_layout(tmp_path):
    """From tensor and pipeline parallel with sequence parallelism to a sharded optimizer, and back to one process."""
    setting = MODELS["adam"]
    (_, first), (_, second) = LAYOUTS["tp 2 x pp 2, sequence, zb-h1"], LAYOUTS["dp 2, sharded, overlapped"]
    expected = on_ranks(4, train_and_save, replace(setting, **first), str(tmp_path))[0]
    for curve in [
        *on_ranks(2, load_and_train, replace(setting, **second), str(tmp_path)),
        load_and_train(setting, str(tmp_path)),
    ]:
        assert worst(curve, expected) < TOLERANCE


def broken_run(setting: Setting, fault: str):
    """The first step with one thing wrong."""
    run = start_run(setting, 1)
    last = run.stages[max(run.stages)]
    if fault == "the bias of another rank":
        summed = cross_entropy.vocab_parallel_cross_entropy
        cross_entropy.vocab_parallel_cross_entropy = lambda x, *rest: summed(x + 0.01 * run.mesh.tp.rank, *rest)
    if fault == "the order's loss on every rank of cp":
        loss = last.loss
        last.loss = lambda x, batch: loss(x, replace(batch, places=None if batch.places is None else batch.places * 0))
    try:
        return train_steps(run, setting, 1)[0]
    finally:
        if fault == "the bias of another rank":
            cross_entropy.vocab_parallel_cross_entropy = summed


@pytest.mark.parametrize(
    ("layout", "fault"), [("tp 2", "the bias of another rank"), ("cp 2", "the order's loss on every rank of cp"), ("tp 2", "")]
)
def test_negative_controls(layout, fault):
    """A fault of each kind exceeds the tolerances above."""
    setting, (world, changes) = MODELS["binary head, dropout"], LAYOUTS[layout]
    expected = one_process(setting, 1)[0][0]
    for step in on_ranks(world, broken_run, replace(setting, **changes), fault):
        assert (worst([step], [expected]) < TOLERANCE) == (not fault)
        assert not fault or worst([step], [expected]) > 10 * TOLERANCE
