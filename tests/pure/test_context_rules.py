"""The rules of context parallelism: silent on a legal run, and with their own message on an illegal one."""

from __future__ import annotations

import pytest
from legal_run import problems

from megatron.config.layout import context_dropout, context_split

# rule, change to the legal run, world size, the whole message
CASES: list[tuple[str, str, int, str]] = [
    (
        "context_split",
        "--seq-length 6 --context-parallel-size 2",
        2,
        "`--seq-length 6` is not divisible by 4: it is cut into 2 x `--context-parallel-size 2`; legal: multiples of 4",
    ),
    (
        "context_split",
        "--seq-length 8 --context-parallel-size 4 --tensor-model-parallel-size 4 --sequence-parallel",
        16,
        "`--seq-length 8` is not divisible by 16: it is cut into 2 x `--context-parallel-size 4`, of which "
        "`--sequence-parallel` cuts each rank's part over `--tensor-model-parallel-size 4`; legal: multiples of 16",
    ),
    (
        "context_dropout",
        "--context-parallel-size 2 --fused-attention-dropout",
        2,
        "`--fused-attention-dropout` conflicts with `--context-parallel-size 2`, whose attention has no kernel that draws "
        "masks; legal: leave it out, or --attention-dropout 0",
    ),
]


@pytest.mark.parametrize(("rule", "change", "world", "message"), CASES, ids=lambda v: v if isinstance(v, str) else "")
def test_a_rule_has_its_message(rule: str, change: str, world: int, message: str) -> None:
    assert problems(change, world) == [message]


def test_every_rule_is_tested() -> None:
    assert {r.__name__ for r in (context_split, context_dropout)} == {case[0] for case in CASES}


@pytest.mark.parametrize(
    ("change", "world"),
    [
        ("--context-parallel-size 4", 8),
        ("--context-parallel-size 2 --tensor-model-parallel-size 2 --sequence-parallel --seq-length 4", 4),
        ("--context-parallel-size 2 --fused-attention-dropout --attention-dropout 0", 2),
        ("--seq-length 7", 1),
        ("--context-parallel-size 3 --seq-length 6", 3),
        ("--context-parallel-size 2 --loss-average micro-batch --recompute-activations", 2),
    ],
)
def test_legal_runs_are_silent(change: str, world: int) -> None:
    assert problems(change, world) == []


def test_one_mistake_is_told_once() -> None:
    """A length that tensor parallelism alone does not cut is its rule's matter."""
    words = "--seq-length 7 --sequence-parallel --tensor-model-parallel-size 2 --context-parallel-size 2"
    assert len(problems(words, 4)) == 1
    assert problems("--context-parallel-size 0") == ["`--context-parallel-size 0` must be greater than 0"]
