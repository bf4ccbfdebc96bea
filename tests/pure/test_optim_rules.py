"""The rules of the optimizer's layout: silent on a legal run, and each with its own message on an illegal one."""

from __future__ import annotations

import pytest
from legal_run import problems

from megatron.config import optim, optimizers
from megatron.config.layout import param_gather
from megatron.config.rules import PRETRAINING_RULES

# rule, change to the legal run, the whole message
CASES: list[tuple[str, str, str]] = [
    (
        "param_gather",
        "--overlap-param-gather",
        "`--overlap-param-gather` needs `--use-distributed-optimizer`: without it every rank updates all its weights",
    ),
    (
        "param_gather",
        "--overlap-param-gather --use-distributed-optimizer --compile",
        "`--overlap-param-gather` conflicts with `--compile`, whose layers do not wait for their weights; leave one out",
    ),
    (
        "adam_kernel",
        "--adam-kernel foreach --optimizer sgd",
        "`--adam-kernel foreach` conflicts with `--optimizer sgd`; legal: --optimizer adam",
    ),
    ("adam_kernel", "--adam-kernel apex", "`--adam-kernel apex` needs apex, which is not installed; legal: fused, foreach"),
]


@pytest.mark.parametrize(("rule", "change", "message"), CASES)
def test_each_mistake_has_one_message(monkeypatch: pytest.MonkeyPatch, rule: str, change: str, message: str) -> None:
    monkeypatch.setattr(optim, "find_spec", lambda name: None)
    assert problems(change) == [message]


def test_every_rule_is_tested_and_in_force() -> None:
    assert {r.__name__ for r in (param_gather, optim.adam_kernel)} == {rule for rule, _, _ in CASES}
    assert {param_gather, optim.adam_kernel, optim.optimizer_package} <= set(PRETRAINING_RULES)


@pytest.mark.parametrize(
    ("value", "why"), [("gone:RULES", "cannot be loaded: No module named 'gone'"), ("math:pi", "is not a tuple of UpdateRule")]
)
@pytest.mark.parametrize("kernel", ["", " --adam-kernel foreach"])
def test_a_wrong_optimizer_package_is_named_once(monkeypatch: pytest.MonkeyPatch, value: str, why: str, kernel: str) -> None:
    """An installed package whose entry point does not hold what it says: once, whatever else is asked of the optimizer."""
    entry = optimizers.EntryPoint("sgd", value, optimizers.GROUP)
    monkeypatch.setattr(optimizers, "OPTIMIZERS", {**optimizers.OPTIMIZERS, "sgd": entry})
    assert problems("--optimizer sgd" + kernel) == [f"`--optimizer sgd` needs {value}, which {why}"]


@pytest.mark.parametrize(
    "change",
    [
        "--use-distributed-optimizer",
        "--use-distributed-optimizer --overlap-param-gather",
        "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --ddp-bucket-size 1",
        "--overlap-grad-reduce --compile",
        "--adam-kernel foreach",
    ],
)
def test_legal_runs(change: str) -> None:
    assert problems(change) == []


def test_installed_apex_is_legal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim, "find_spec", lambda name: name)
    assert problems("--adam-kernel apex") == []


def test_a_bucket_has_elements() -> None:
    assert problems("--ddp-bucket-size 0") == ["`--ddp-bucket-size 0` must be greater than 0"]
