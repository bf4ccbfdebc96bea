"""The rules of number formats and the loss scale: silent on a legal run, and each with its own message on an illegal one."""

from __future__ import annotations

import pytest
from legal_run import argv, problems

from megatron.config.batch import skipped_iterations
from megatron.config.command_line.parse import parse
from megatron.config.precision import RULES
from megatron.config.rules import PRETRAINING_RULES

# rule, change to the legal run, the whole message
CASES: list[tuple[str, str, str]] = [
    ("one_format", "--fp16 --bf16", "`--fp16` and `--bf16` exclude each other; give one of them, or none for fp32"),
    (
        "gradients_in_bf16",
        "--fp16 --grad-reduce-in-bf16",
        "`--grad-reduce-in-bf16` needs `--bf16`: only gradients of bfloat16 weights are kept in bfloat16",
    ),
    (
        "scale_range",
        "--fp16 --initial-loss-scale 2 --min-loss-scale 4",
        "`--min-loss-scale 4.0` is greater than `--initial-loss-scale 2.0`, where the scale begins; legal: 0 to 2",
    ),
    (
        "dynamic_scale_skips",
        "--fp16 --on-nonfinite abort",
        "`--on-nonfinite abort` conflicts with the dynamic loss scale of `--fp16`, which grows until it overflows; "
        "legal: --on-nonfinite skip with --max-consecutive-skips, or a --loss-scale",
    ),
    (
        "skipped_iterations",
        "--skip-train-iterations 3 9-7",
        "`--skip-train-iterations 3 9-7` has '9-7', which is neither an iteration nor a range of iterations; "
        "legal: numbers and ranges such as 120 300-310, from 1 on",
    ),
]


@pytest.mark.parametrize(("rule", "change", "message"), CASES, ids=lambda v: v if isinstance(v, str) else "")
def test_a_rule_has_its_message(rule: str, change: str, message: str) -> None:
    assert problems(change) == [message]


def test_every_rule_is_tested() -> None:
    assert {rule.__name__ for rule in (*RULES.every_run, skipped_iterations)} == {case[0] for case in CASES}
    assert {*RULES.every_run, skipped_iterations} <= set(PRETRAINING_RULES)


@pytest.mark.parametrize(
    "change",
    [
        "--fp16",
        "--fp16 --loss-scale 128 --on-nonfinite abort",
        "--fp16 --loss-scale 0 --hysteresis 4",
        "--bf16 --on-nonfinite abort",
        "--bf16 --grad-reduce-in-bf16 --use-distributed-optimizer --overlap-grad-reduce",
        "--bf16 --accumulate-allreduce-grads-in-fp32 --no-gradient-accumulation-fusion",
        "--loss-scale 8",
        "--skip-train-iterations 1 5-5 7-900",
        "--fp16 --loss-scale 4 --min-loss-scale 8 --initial-loss-scale 2",
    ],
)
def test_legal_runs_are_silent(change: str) -> None:
    assert problems(change) == []


def test_one_mistake_is_told_once() -> None:
    assert problems("--fp16 --initial-loss-scale 0") == ["`--initial-loss-scale 0.0` must be greater than 0"]
    assert problems("--fp16 --loss-scale -1 --on-nonfinite abort") == ["`--loss-scale -1.0` must be 0 or greater"]


def test_gradients_are_in_one_format() -> None:
    change = "--bf16 --grad-reduce-in-bf16 --accumulate-allreduce-grads-in-fp32"
    both = "`--grad-reduce-in-bf16` and `--accumulate-allreduce-grads-in-fp32`"
    assert problems(change) == [f"{both} set the same thing to different values"]
    assert notes("--bf16 --accumulate-allreduce-grads-in-fp32") == ()


def notes(change: str) -> tuple[str, ...]:
    return parse(argv(change), program="test", check_disk=False).notes


def test_settings_of_a_dynamic_scale_that_is_not_there_are_noted() -> None:
    why = "only --fp16 has a dynamic loss scale"
    assert notes("--bf16 --initial-loss-scale 65536 --hysteresis 4") == (
        f"--initial-loss-scale changes nothing: {why}",
        f"--hysteresis changes nothing: {why}",
    )
    assert notes("--fp16 --loss-scale 64 --loss-scale-window 10") == (
        "--loss-scale-window changes nothing: --loss-scale 64 is constant",
    )
    assert notes("--fp16 --initial-loss-scale 65536 --loss-scale-window 500") == ()
