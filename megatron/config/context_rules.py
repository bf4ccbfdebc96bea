"""The rules of context parallelism: sequences that cut evenly, and no kernel that draws its own dropout."""

from __future__ import annotations

from collections.abc import Iterator
from math import lcm

from megatron.config.case import Case, Rule
from megatron.config.errors import Problem


def context_split(c: Case) -> Iterator[Problem]:
    """Each context-parallel rank has two equal chunks of a sequence, which sequence parallelism may cut once more."""
    cp, tp, seq = c["layout.context_parallel_size"], c["layout.tensor_model_parallel_size"], c["data.seq_length"]
    if cp == 1 or not seq:
        return
    cut = tp if c["layout.sequence_parallel"] else 1
    unit = cp * lcm(2, cut)
    if seq % unit and not seq % cut:  # a length that tp alone does not cut has been told
        of = f"2 x `--context-parallel-size {cp}`"
        if cut > 1:
            of += f", of which `--sequence-parallel` cuts each rank's part over `--tensor-model-parallel-size {tp}`"
        yield Problem(
            c.flag_text("data.seq_length"), f"is not divisible by {unit}: it is cut into {of}", f"multiples of {unit}"
        )


def context_dropout(c: Case) -> Iterator[Problem]:
    """Attention around the ring has no fused kernel, so nothing that could draw by itself."""
    fused = c["model.fused_attention_dropout"] and c["model.attention_dropout"] > 0
    if fused and c["layout.context_parallel_size"] > 1:
        rule = f"cannot go with {c.flag_text('layout.context_parallel_size')}, whose attention has no kernel that draws numbers"
        yield Problem(c.flag_text("model.fused_attention_dropout"), rule, "leave it out, or --attention-dropout 0")


CONTEXT_RULES: tuple[Rule, ...] = (context_split, context_dropout)
