"""Learning rates at the boundaries where curves go off by one."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from megatron.config.schema import BatchConfig, OptimConfig
from megatron.optim.lr import LRSchedule

DECAY = {"start_weight_decay": 0.01, "end_weight_decay": 0.01}
OPTIM = OptimConfig(lr=1.0, min_lr=0.1, lr_decay_style="linear", lr_warmup_iters=10, lr_decay_iters=110, **DECAY)
BATCH = BatchConfig(micro_batch_size=1, global_batch_size=4, train_iters=200)


def rates(style: str, *steps: int) -> list[float]:
    schedule = LRSchedule.from_config(replace(OPTIM, lr_decay_style=style), BATCH)
    return [schedule.rate(4 * step) for step in steps]


def test_warm_up_begins_at_zero_and_includes_its_end():
    assert rates("linear", 0, 1, 5, 10) == pytest.approx([0.0, 0.1, 0.5, 1.0])


def test_decay_is_measured_from_the_end_of_warm_up():
    assert rates("linear", 60, 110, 111, 1000) == pytest.approx([0.55, 0.1, 0.1, 0.1])
    assert rates("cosine", 35, 60, 110, 1000) == pytest.approx([0.1 + 0.45 * (1 + math.sqrt(0.5)), 0.55, 0.1, 0.1])
    assert rates("constant", 60, 1000) == [1.0, 1.0]
    assert rates("inverse-square-root", 40, 90, 111) == pytest.approx([0.5, 1 / 3, 0.1])


def test_fraction_is_of_the_decay_length():
    schedule = LRSchedule.from_config(replace(OPTIM, lr_warmup_iters=0, lr_warmup_fraction=0.1), BATCH)
    assert schedule.warmup == 44 and schedule.decay == 440


def test_lengths_in_samples():
    optim = replace(OPTIM, lr_warmup_iters=0, lr_decay_iters=None, lr_warmup_samples=30, lr_decay_samples=300)
    schedule = LRSchedule.from_config(optim, BatchConfig(micro_batch_size=1, global_batch_size=4, train_samples=900))
    assert (schedule.warmup, schedule.decay, schedule.rate(15)) == (30, 300, 0.5)


def test_weight_decay_over_time():
    optim = replace(OPTIM, start_weight_decay=0.0, end_weight_decay=0.2, weight_decay_incr_style="linear")
    # Over the 200 steps of the run, not the 110 of the learning rate's decay.
    schedule = LRSchedule.from_config(optim, BATCH)
    assert [schedule.weight_decay(s) for s in (0, 400, 800, 999)] == pytest.approx([0.0, 0.1, 0.2, 0.2])
    cosine = LRSchedule.from_config(replace(optim, weight_decay_incr_style="cosine"), BATCH)
    assert cosine.weight_decay(200) == pytest.approx(0.1 * (1 - math.sqrt(0.5)))
    assert LRSchedule.from_config(OPTIM, BATCH).weight_decay(5) == OPTIM.weight_decay
    samples = LRSchedule.from_config(optim, BatchConfig(micro_batch_size=1, global_batch_size=4, train_samples=100))
    assert samples.weight_decay(50) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("style", "quarter", "half"),
    [
        ("linear", 0.775, 0.55),
        ("cosine", 0.8681981, 0.55),  # 0.1 + 0.9 (1 + cos(pi/4)) / 2
        ("exponential", 0.7136136, 0.4727922),  # 0.1 + 0.9 (2 / 2^(1/4) - 1), 0.1 + 0.9 (2 / 2^(1/2) - 1)
        ("minus_sqrt", 0.55, 0.3636039),  # 0.1 + 0.9 (1 - 1/2), 0.1 + 0.9 (1 - (1/2)^(1/2))
    ],
)
def test_wsd_is_stable_until_its_decay(style, quarter, half):
    """Warm-up to step 10, stable to step 70, then 40 steps down."""
    optim = replace(OPTIM, lr_decay_style="WSD", lr_wsd_decay_style=style, lr_wsd_decay_iters=40)
    wanted = [0.5, 1.0, 1.0, 1.0, quarter, half, 0.1, 0.1]
    schedule = LRSchedule.from_config(optim, BATCH)
    assert [schedule.rate(4 * step) for step in (5, 10, 40, 70, 80, 90, 110, 111)] == pytest.approx(wanted, abs=1e-7)
    lengths = {"lr_decay_samples": 440, "lr_warmup_samples": 40, "lr_wsd_decay_samples": 160}
    optim = replace(optim, lr_decay_iters=None, lr_warmup_iters=0, lr_wsd_decay_iters=None, **lengths)
    assert replace(schedule, decay_weights_over=900) == LRSchedule.from_config(
        optim, BatchConfig(micro_batch_size=1, global_batch_size=8, train_samples=900)
    )


def test_a_warm_up_can_begin_above_zero():
    schedule = LRSchedule.from_config(replace(OPTIM, lr_warmup_init=0.2), BATCH)
    assert [schedule.rate(4 * step) for step in (0, 5, 10, 60)] == pytest.approx([0.2, 0.6, 1.0, 0.55])


def test_embedding_and_output_layer_can_have_a_peak_and_a_floor_of_their_own():
    optim = replace(OPTIM, lr_warmup_init=0.2, decoupled_lr=3.0, decoupled_min_lr=1.0)
    schedule = LRSchedule.from_config(optim, BATCH)
    assert [schedule.decoupled_rate(4 * step) for step in (0, 5, 10, 60, 111)] == pytest.approx([0.2, 1.6, 3.0, 2.0, 1.0])
    assert schedule.rate(240) == pytest.approx(0.55) == LRSchedule.from_config(OPTIM, BATCH).decoupled_rate(240)
    assert LRSchedule.from_config(replace(optim, decoupled_min_lr=None), BATCH).decoupled_rate(444) == 0.1


def test_lengths_in_steps_are_those_of_a_changing_batch_size():
    """100 steps of 2, then steps of 4: warm-up ends at step 10, the decay of WSD goes from step 105 to step 110."""
    batch = BatchConfig(micro_batch_size=1, global_batch_size=4, batch_size_steps=(0, 2, 200, 4), train_iters=120)
    schedule = LRSchedule.from_config(replace(OPTIM, lr_decay_style="WSD", lr_wsd_decay_iters=5), batch)
    assert (schedule.warmup, schedule.decay, schedule.annealing, schedule.decay_weights_over) == (20, 240, 20, 280)
