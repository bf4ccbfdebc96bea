"""The rules of GPT and BERT: settings that belong to the other one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType

from megatron.config.case import Case, Rule
from megatron.config.errors import Problem

# What a program's model has no use for.
FOREIGN: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "gpt": ("model.bert_binary_head", "data.mask_prob", "data.short_seq_prob"),
        "bert": (
            "model.untie_embeddings_and_output_weights",
            "data.reset_position_ids",
            "data.reset_attention_mask",
            "data.eod_mask_loss",
        ),
    }
)


def foreign(c: Case) -> Iterator[Problem]:
    """A setting that the model does not have would silently do nothing."""
    own = c["model.architecture"]
    for name in FOREIGN[own]:
        if c.given(name):
            other = {"gpt": "BERT (pretrain_bert.py)", "bert": "GPT (pretrain_gpt.py)"}[own]
            yield Problem(c.flag_text(name), f"belongs to {other}; leave it out")


def shortest_pair(c: Case) -> Iterator[Problem]:
    """[CLS], two segments of a token each, and two [SEP]."""
    seq = c["data.seq_length"]
    if c["model.architecture"] == "bert" and seq is not None and seq < 5 and "data.seq_length" not in c.bad:
        yield Problem(c.flag_text("data.seq_length"), "is too short for [CLS], two segments and two [SEP]", "5 and more")


ARCHITECTURE_RULES: tuple[Rule, ...] = (foreign, shortest_pair)
