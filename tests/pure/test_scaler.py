"""Loss scales, step by step, beside Megatron-LM's rule; and sets of iterations."""

from __future__ import annotations

import json
import random

import pytest

from megatron.config.notation import parse_iteration_ranges
from megatron.optim.scaler import ConstantScaler, DynamicScaler, Scaler

# window 4, hysteresis 2: steps (. an update, x an overflow) and the scale after each of them
TABLE = [
    ("xxx", [8, 4, 2]),
    ("x.x.x.x", [8, 8, 4, 4, 2, 2, 1]),  # an update between two overflows gives no patience back
    ("....", [8, 8, 8, 16]),
    ("...x...", [8, 8, 8, 8, 8, 8, 8]),  # an overflow starts the count anew
    ("x....xx", [8, 8, 8, 8, 16, 16, 8]),  # patience comes back when the scale grows
    ("xx....xx", [8, 4, 4, 4, 4, 8, 8, 4]),
    ("xxxxxxx", [8, 4, 2, 1, 0.5, 0.5, 0.5]),  # the floor
    ("........", [8, 8, 8, 16, 16, 16, 16, 32]),
]


def scales(scaler: Scaler, steps: str) -> list[float]:
    found = []
    for step in steps:
        scaler.update(step == ".")
        found.append(scaler.scale)
    return found


@pytest.mark.parametrize(("steps", "expected"), TABLE)
def test_the_scale_after_each_step(steps: str, expected: list[float]) -> None:
    assert scales(DynamicScaler(8.0, 0.5, 4, 2), steps) == expected


def test_the_defaults_of_megatron() -> None:
    scaler = DynamicScaler(2.0**32, 1.0, 1000, 2)
    assert scales(scaler, "xxx") == [2.0**32, 2.0**31, 2.0**30]
    assert set(scales(scaler, "." * 999)) == {2.0**30}
    assert scales(scaler, ".xx") == [2.0**31, 2.0**31, 2.0**30]
    assert scales(DynamicScaler(2.0**32, 1.0, 1000, 1), "xx") == [2.0**31, 2.0**30]


def test_a_constant_scale_is_constant() -> None:
    scaler = ConstantScaler(128.0)
    assert scales(scaler, "x.xx.") == [128.0] * 5 and ConstantScaler().scale == 1.0 and scaler.scalars() == {}


@pytest.mark.parametrize("cut", range(1, 30))
def test_a_saved_scaler_goes_on_as_if_nothing_had_been(cut: int) -> None:
    steps = "".join(random.Random(cut).choices(".x", weights=(4, 1), k=60))
    whole, first, second = (DynamicScaler(1024.0, 1.0, 4, 2) for _ in range(3))
    expected = scales(whole, steps)
    before = scales(first, steps[:cut])
    second.load_scalars(json.loads(json.dumps(first.scalars())))
    assert second.scale == first.scale
    assert before + scales(second, steps[cut:]) == expected and second == whole


def test_what_another_kind_of_scaler_saved_changes_nothing() -> None:
    dynamic, constant = DynamicScaler(1024.0, 1.0, 4, 2), ConstantScaler(2.0)
    dynamic.load_scalars(constant.scalars())
    constant.load_scalars(dynamic.scalars())
    assert dynamic == DynamicScaler(1024.0, 1.0, 4, 2) and constant == ConstantScaler(2.0)


def test_sets_of_iterations() -> None:
    assert parse_iteration_ranges(["3", "7-9"]) == (range(3, 4), range(7, 10)) and parse_iteration_ranges([]) == ()
    for word in ("0", "9-7", "x", "1-", "-1", "1.5", "1-2-3", ""):
        with pytest.raises(ValueError, match="which is neither an iteration"):
            parse_iteration_ranges(["1", word])
