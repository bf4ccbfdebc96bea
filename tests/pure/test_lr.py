"""Learning rates at the boundaries where curves go off by one."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from megatron.config.schema import BatchConfig, OptimConfig
from megatron.optim.lr import Schedule

OPTIM = OptimConfig(lr=1.0, min_lr=0.1, lr_decay_style="linear", lr_warmup_iters=10, lr_decay_iters=110)
BATCH = BatchConfig(global_batch_size=4, train_iters=200)


def rates(style: str, *steps: int) -> list[float]:
    schedule = Schedule.of(replace(OPTIM, lr_decay_style=style), BATCH)
    return [schedule.rate(4 * step) for step in steps]


def test_warm_up_begins_at_zero_and_includes_its_end():
    assert rates("linear", 0, 1, 5, 10) == pytest.approx([0.0, 0.1, 0.5, 1.0])


def test_decay_is_measured_from_the_end_of_warm_up():
    assert rates("linear", 60, 110, 111, 1000) == pytest.approx([0.55, 0.1, 0.1, 0.1])
    assert rates("cosine", 35, 60, 110, 1000) == pytest.approx([0.1 + 0.45 * (1 + math.sqrt(0.5)), 0.55, 0.1, 0.1])
    assert rates("constant", 60, 1000) == [1.0, 1.0]
    assert rates("inverse-square-root", 40, 90, 111) == pytest.approx([0.5, 1 / 3, 0.1])


def test_fraction_is_of_the_decay_length():
    schedule = Schedule.of(replace(OPTIM, lr_warmup_iters=0, lr_warmup_fraction=0.1), BATCH)
    assert schedule.warmup == 44 and schedule.decay == 440


def test_lengths_in_samples():
    optim = replace(OPTIM, lr_warmup_iters=0, lr_decay_iters=None, lr_warmup_samples=30, lr_decay_samples=300)
    schedule = Schedule.of(optim, BatchConfig(global_batch_size=4, train_samples=900))
    assert (schedule.warmup, schedule.decay, schedule.rate(15)) == (30, 300, 0.5)


def test_weight_decay_over_time():
    optim = replace(OPTIM, start_weight_decay=0.0, end_weight_decay=0.2, weight_decay_incr_style="linear")
    assert [Schedule.of(optim, BATCH).weight_decay(s) for s in (0, 220, 440, 999)] == pytest.approx([0.0, 0.1, 0.2, 0.2])
    cosine = Schedule.of(replace(optim, weight_decay_incr_style="cosine"), BATCH)
    assert cosine.weight_decay(110) == pytest.approx(0.1 * (1 - math.sqrt(0.5)))
    assert Schedule.of(OPTIM, BATCH).weight_decay(5) == OPTIM.weight_decay
