"""The rules of recomputation: what goes with which granularity, as in Megatron-LM, but never in silence."""

from __future__ import annotations

from collections.abc import Iterator

from megatron.config.case import Case, Rule, divisors
from megatron.config.errors import Problem

GRANULARITY = "memory.recompute_granularity"
METHOD = "memory.recompute_method"
LAYERS = "memory.recompute_num_layers"
DISTRIBUTE = "memory.distribute_saved_activations"
FULL = "--recompute-granularity full"


def recompute_method(c: Case) -> Iterator[Problem]:
    """Whole layers are run again by a method; the core attention alone has none."""
    if c.bad & {GRANULARITY, METHOD}:
        return
    if c[GRANULARITY] == "full":
        if c[METHOD] is None:
            yield Problem(c.flag_text(GRANULARITY), "needs `--recompute-method`", "uniform, block")
        return
    for name in (METHOD, LAYERS):
        if not c.given(name) or name in c.bad:
            continue
        if c[GRANULARITY] is None:
            yield Problem(c.flag_text(name), f"needs `{FULL}`")
        else:
            yield Problem(c.flag_text(name), f"cannot go with {c.flag_text(GRANULARITY)}, which is that of every layer", FULL)


def distributed_activations(c: Case) -> Iterator[Problem]:
    """Saved inputs are cut over tensor parallelism where they are whole on every rank."""
    tp, hidden, what = c["layout.tensor_model_parallel_size"], c["model.hidden_size"], c.flag_text(DISTRIBUTE)
    if not c[DISTRIBUTE] or c.bad & {GRANULARITY, "layout.tensor_model_parallel_size"}:
        return
    if c[GRANULARITY] != "full":
        yield Problem(what, f"needs `{FULL}`: it cuts what chunks of whole layers start from")
    if tp < 2:
        yield Problem(what, "needs `--tensor-model-parallel-size` of 2 or more: one rank has nobody to share with")
    elif c["layout.sequence_parallel"]:
        yield Problem(what, "cannot go with `--sequence-parallel`, under which each rank has its own part; leave it out")
    elif hidden and hidden % tp:
        rule = f"is not divisible by {c.flag_text('layout.tensor_model_parallel_size')} under {what}"
        yield Problem(c.flag_text("model.hidden_size"), rule, divisors(hidden))


def compiled_recompute(c: Case) -> Iterator[Problem]:
    """Nothing makes sure that a compiled attention draws the same mask twice."""
    fused = c["model.fused_attention_dropout"] and c["model.attention_dropout"] > 0.0
    if c[GRANULARITY] == "selective" and c["batch.compile"] and fused:
        rule = "cannot go with `--compile` and `--fused-attention-dropout`: its second run would have to draw the same mask"
        yield Problem(c.flag_text(GRANULARITY), rule, "--recompute-granularity full, or leave one of them out")


RECOMPUTE_RULES: tuple[Rule, ...] = (recompute_method, distributed_activations, compiled_recompute)
