"""The rules of GPT and BERT: silent on a legal run, and with their own message on an illegal one."""

from __future__ import annotations

import pytest
from legal_run import argv, problems

from megatron.config.command_line.parse import parse
from megatron.config.data import shortest_pair
from megatron.config.errors import ConfigError
from megatron.config.model import UNSUPPORTED, other_architecture_settings
from megatron.config.options import by_name

BERT, GPT = "belongs to BERT (pretrain_bert.py); leave it out", "belongs to GPT (pretrain_gpt.py); leave it out"

# rule, change to the legal run, the whole message
OF_GPT = [
    ("other_architecture_settings", "--bert-no-binary-head", f"`--bert-no-binary-head` {BERT}"),
    ("other_architecture_settings", "--mask-prob 0.2", f"`--mask-prob 0.2` {BERT}"),
    ("other_architecture_settings", "--short-seq-prob 0.2", f"`--short-seq-prob 0.2` {BERT}"),
]
OF_BERT = [
    ("other_architecture_settings", "--untie-embeddings-and-output-weights", f"`--untie-embeddings-and-output-weights` {GPT}"),
    ("other_architecture_settings", "--reset-position-ids", f"`--reset-position-ids` {GPT}"),
    ("other_architecture_settings", "--reset-attention-mask", f"`--reset-attention-mask` {GPT}"),
    ("other_architecture_settings", "--eod-mask-loss", f"`--eod-mask-loss` {GPT}"),
    (
        "shortest_pair",
        "--seq-length 4",
        "`--seq-length 4` is too short for [CLS], two segments and two [SEP]; legal: 5 and more",
    ),
]


def bert_problems(change: str) -> list[str]:
    try:
        parse(argv(change), program="test", defaults={"model.architecture": "bert"}, check_disk=False)
    except ConfigError as error:
        return [str(p) for p in error.problems]
    return []


@pytest.mark.parametrize(("rule", "change", "message"), OF_GPT)
def test_a_rule_has_its_message_for_a_gpt(rule: str, change: str, message: str) -> None:
    assert problems(change) == [message]


@pytest.mark.parametrize(("rule", "change", "message"), OF_BERT)
def test_a_rule_has_its_message_for_a_bert(rule: str, change: str, message: str) -> None:
    assert bert_problems(change) == [message]


def test_every_rule_and_every_foreign_setting_is_tested() -> None:
    assert {r.__name__ for r in (other_architecture_settings, shortest_pair)} == {case[0] for case in OF_GPT + OF_BERT}
    for own, cases in (("gpt", OF_GPT), ("bert", OF_BERT)):
        flags = {change.split()[0] for rule, change, _ in cases if rule == "other_architecture_settings"}
        spelled = {by_name()[name].off_flag or by_name()[name].flag for name in UNSUPPORTED[own]}
        assert flags == spelled


@pytest.mark.parametrize("change", ["", "--mask-prob 0.2 --short-seq-prob 0 --bert-no-binary-head", "--seq-length 5"])
def test_legal_runs_of_a_bert_are_silent(change: str) -> None:
    assert bert_problems(change) == []


def test_bert_settings_out_of_range_are_refused() -> None:
    assert bert_problems("--mask-prob 0 --short-seq-prob 1.5") == [
        "`--mask-prob 0.0` must be greater than 0 and less than 1",
        "`--short-seq-prob 1.5` must be from 0 to 1",
    ]


def test_a_model_has_one_architecture() -> None:
    """It is the program's, no setting of a user."""
    with pytest.raises(ConfigError, match="architecture"):
        parse(argv("--architecture bert"), program="test", check_disk=False)
