"""Each rule of pipeline parallelism has its message on an illegal run."""

from __future__ import annotations

import pytest
from legal_run import problems

from megatron.config.pipeline import RULES, numbers_that_fit, one_split, shared_layers

# rule, change to the legal run, world size, the whole message
CASES: list[tuple[str, str, int, str]] = [
    (
        "virtual_stages",
        "--pipeline-model-parallel-size 2 --pipeline-schedule interleaved",
        2,
        "`--pipeline-schedule interleaved` needs `--num-layers-per-virtual-pipeline-stage`, the layers of one virtual stage, "
        "or `--num-virtual-stages-per-pipeline-rank`",
    ),
    (
        "virtual_stages",
        "--pipeline-model-parallel-size 2 --pipeline-schedule 1f1b --num-layers-per-virtual-pipeline-stage 1",
        2,
        "`--pipeline-schedule 1f1b` has no virtual stages, and conflicts with `--num-layers-per-virtual-pipeline-stage 1`; "
        "legal: --pipeline-schedule interleaved, or leave one of them out",
    ),
    (
        "virtual_stages",
        "--num-layers 4 --pipeline-model-parallel-size 2 --pipeline-schedule zb-v --num-layers-per-virtual-pipeline-stage 1",
        2,
        "`--pipeline-schedule zb-v` always has 2 virtual stages on each rank, and conflicts with "
        "`--num-layers-per-virtual-pipeline-stage 1`; legal: --pipeline-schedule interleaved, or leave one of them out",
    ),
    (
        "virtual_stages",
        "--num-layers-per-virtual-pipeline-stage 1",
        1,
        "`--num-layers-per-virtual-pipeline-stage 1` needs `--pipeline-model-parallel-size` of at least 2: "
        "one rank has none to interleave with",
    ),
    (
        "enough_layers",
        "--pipeline-model-parallel-size 4",
        4,
        "`--pipeline-model-parallel-size 4` makes 4 stages, and `--num-layers 2` leaves some of them empty; "
        "legal: --num-layers 4 or more, or --pipeline-model-parallel-size 2 or less",
    ),
    (
        "enough_layers",
        "--num-layers 5 --pipeline-model-parallel-size 3 --pipeline-schedule zb-v",
        3,
        "`--pipeline-model-parallel-size 3` and `--pipeline-schedule zb-v` make 6 stages, and `--num-layers 5` leaves some of "
        "them empty; legal: --num-layers 6 or more, or --pipeline-model-parallel-size 2 or less",
    ),
    (
        "enough_layers",
        "--num-layers 1 --pipeline-schedule zb-v",
        1,
        "`--pipeline-model-parallel-size 1` and `--pipeline-schedule zb-v` make 2 stages, and `--num-layers 1` leaves some of "
        "them empty; legal: --num-layers 2 or more",
    ),
    (
        "stage_layers",
        "--num-layers 4 --pipeline-model-parallel-size 2 --pipeline-stage-layers 4",
        2,
        "`--pipeline-stage-layers 4` names 1 stage, not the 2 of 2 pipeline ranks; legal: 2 numbers, 0 or greater, of sum 4",
    ),
    (
        "stage_layers",
        "--num-layers 4 --pipeline-model-parallel-size 2 --pipeline-stage-layers 1 2",
        2,
        "`--pipeline-stage-layers 1 2` adds up to 3 layers, not to `--num-layers 4`; legal: 2 numbers, 0 or greater, of sum 4",
    ),
    (
        "stage_layers",
        "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1 --num-layers 4 "
        "--pipeline-stage-layers 5 -2",
        2,
        "`--pipeline-stage-layers 5 -2` names 2 stages, not the 4 of 2 pipeline ranks x 2 and has a negative number of layers; "
        "legal: 4 numbers, 0 or greater, of sum 4",
    ),
    (
        "split_backward",
        "--pipeline-model-parallel-size 2 --pipeline-schedule zb-h1 --compile",
        2,
        "`--pipeline-schedule zb-h1` conflicts with `--compile`: it computes weight gradients apart from the layers, which "
        "would break their graph; legal: gpipe, 1f1b or interleaved, or leave out --compile",
    ),
]


@pytest.mark.parametrize(("rule", "change", "world", "message"), CASES, ids=lambda v: v if isinstance(v, str) else "")
def test_a_rule_has_its_message(rule: str, change: str, world: int, message: str) -> None:
    assert problems(change, world) == [message]


def test_every_rule_is_tested() -> None:
    # See test_stage_split.py, and for the last test_new_schedule.py: no schedule of ours has such a need.
    elsewhere = {one_split, shared_layers, numbers_that_fit}
    assert {rule.__name__ for rule in RULES.every_run if rule not in elsewhere} == {case[0] for case in CASES}
