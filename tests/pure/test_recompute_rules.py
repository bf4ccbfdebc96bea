"""The rules of recomputation: silent on a legal run, and each with its own message on an illegal one."""

from __future__ import annotations

import pytest
from legal_run import problems

from megatron.config.memory import RULES
from megatron.config.rules import PRETRAINING_RULES

# rule, change to the legal run, world size, the whole message
CASES: list[tuple[str, str, int, str]] = [
    (
        "recompute_method",
        "--recompute-granularity full",
        1,
        "`--recompute-granularity full` needs `--recompute-method`; legal: uniform, block",
    ),
    (
        "recompute_method",
        "--recompute-activations --recompute-method block",
        1,
        "`--recompute-method block` conflicts with `--recompute-granularity selective`, which applies to every layer; "
        "legal: --recompute-granularity full",
    ),
    (
        "recompute_method",
        "--recompute-activations --recompute-num-layers 2",
        1,
        "`--recompute-num-layers 2` conflicts with `--recompute-granularity selective`, which applies to every layer; "
        "legal: --recompute-granularity full",
    ),
    ("recompute_method", "--recompute-method uniform", 1, "`--recompute-method uniform` needs `--recompute-granularity full`"),
    ("recompute_method", "--recompute-num-layers 2", 1, "`--recompute-num-layers 2` needs `--recompute-granularity full`"),
    (
        "distributed_activations",
        "--distribute-saved-activations --tensor-model-parallel-size 2",
        2,
        "`--distribute-saved-activations` needs `--recompute-granularity full`: it shards the inputs of chunks of layers",
    ),
    (
        "distributed_activations",
        "--distribute-saved-activations --recompute-granularity full --recompute-method block",
        1,
        "`--distribute-saved-activations` needs `--tensor-model-parallel-size` of 2 or more: a single rank cannot share",
    ),
    (
        "distributed_activations",
        "--distribute-saved-activations --recompute-granularity full --recompute-method block --sequence-parallel "
        "--tensor-model-parallel-size 2",
        2,
        "`--distribute-saved-activations` conflicts with `--sequence-parallel`, which already shards these inputs; "
        "leave it out",
    ),
    (
        "distributed_activations",
        "--distribute-saved-activations --recompute-granularity full --recompute-method block --hidden-size 15 --kv-channels 4 "
        "--tensor-model-parallel-size 2",
        2,
        "`--hidden-size 15` is not divisible by `--tensor-model-parallel-size 2` under `--distribute-saved-activations`; "
        "legal: 1, 3, 5, 15",
    ),
    (
        "compiled_recompute",
        "--recompute-activations --compile --fused-attention-dropout",
        1,
        "`--recompute-granularity selective` conflicts with `--compile` and `--fused-attention-dropout`: the recomputation "
        "would draw another mask; legal: --recompute-granularity full, or leave one of them out",
    ),
]


@pytest.mark.parametrize(("rule", "change", "world", "message"), CASES, ids=lambda v: v if isinstance(v, str) else "")
def test_a_rule_has_its_message(rule: str, change: str, world: int, message: str) -> None:
    assert problems(change, world) == [message]


def test_every_rule_is_tested() -> None:
    assert {r.__name__ for r in RULES.every_run} == {case[0] for case in CASES}
    assert set(RULES.every_run) <= set(PRETRAINING_RULES)


@pytest.mark.parametrize(
    ("change", "world"),
    [
        ("--recompute-activations", 1),
        ("--recompute-activations --compile", 1),
        ("--recompute-activations --compile --fused-attention-dropout --attention-dropout 0", 1),
        ("--recompute-granularity full --recompute-method uniform --recompute-num-layers 5 --sequence-parallel", 1),
        ("--recompute-granularity full --recompute-method block --compile --fused-attention-dropout", 1),
        (
            "--recompute-granularity full --recompute-method uniform --distribute-saved-activations "
            "--tensor-model-parallel-size 2",
            2,
        ),
    ],
)
def test_legal_runs_are_silent(change: str, world: int) -> None:
    assert problems(change, world) == []


def test_one_mistake_in_recomputation_is_told_once() -> None:
    assert problems("--recompute-granularity some --recompute-method uniform --distribute-saved-activations") == [
        "`--recompute-granularity some` is not known; legal: full, selective"
    ]
    assert problems("--recompute-granularity full --recompute-method block --recompute-num-layers 0") == [
        "`--recompute-num-layers 0` must be greater than 0"
    ]
