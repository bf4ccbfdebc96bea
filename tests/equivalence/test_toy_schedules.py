"""Schedules that the package does not have, known by their rows alone, give the run of one process."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType
from unittest.mock import patch

import pytest
from ranks import on_ranks
from reference import GPT2, Setting, trajectory, with_dropout
from test_pipeline import SGD, pipeline_run, same_run
from toy_schedules import TOYS

from megatron.pipeline.schedules import schedule as book

TIED = Setting(replace(with_dropout(GPT2), num_layers=5), masked=True, optim=SGD)
STEPS = 4


def with_toys(setting: Setting, steps: int):
    with patch.object(book, "SCHEDULES", MappingProxyType({**book.SCHEDULES, **TOYS})):
        return pipeline_run(setting, steps)


@pytest.mark.parametrize("name", TOYS)
def test_a_new_schedule_is_the_run_of_one_process(name):
    setting = replace(TIED, pp=2, schedule=name)
    results = on_ranks(2, with_toys, setting, STEPS)
    expected, initial, final = trajectory(TIED, STEPS)
    same_run(results, expected, initial, final, 2e-5)
