"""Settings of recomputation: what is kept for the backward pass, and what is computed again, never in silence."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron.config.check import ConfigCheck, Rules, divisors
from megatron.config.errors import Problem
from megatron.config.option import POSITIVE, option

GRANULARITY = "memory.recompute_granularity"
METHOD = "memory.recompute_method"
LAYERS = "memory.recompute_num_layers"
DISTRIBUTE = "memory.distribute_saved_activations"
FULL = "--recompute-granularity full"


@dataclass(frozen=True)
class MemoryConfig:
    """Activations kept for the backward pass, or computed again."""

    recompute_granularity: str | None = option(
        None,
        "run again in the backward pass instead of keeping: selective: the core attention; full: whole layers",
        choices=("full", "selective"),
        values={"--recompute-activations": "selective"},
    )
    recompute_method: str | None = option(
        None,
        "of full: uniform: all layers, in chunks of --recompute-num-layers; block: that many first layers of each stage",
        choices=("uniform", "block"),
    )
    recompute_num_layers: int = option(
        1, "layers of a chunk (uniform), or layers of each stage that are run again (block)", legal=POSITIVE
    )
    distribute_saved_activations: bool = option(
        False, "of full: each tensor-parallel rank keeps its share of what a chunk starts from"
    )


def recompute_method(c: ConfigCheck) -> Iterator[Problem]:
    """Whole layers are run again by a method; the core attention alone has none."""
    if c.invalid & {GRANULARITY, METHOD}:
        return
    if c[GRANULARITY] == "full":
        if c[METHOD] is None:
            yield Problem(c.flag_text(GRANULARITY), "needs `--recompute-method`", "uniform, block")
        return
    for name in (METHOD, LAYERS):
        if not c.is_set(name) or name in c.invalid:
            continue
        if c[GRANULARITY] is None:
            yield Problem(c.flag_text(name), f"needs `{FULL}`")
        else:
            yield Problem(c.flag_text(name), f"cannot go with {c.flag_text(GRANULARITY)}, which is that of every layer", FULL)


def distributed_activations(c: ConfigCheck) -> Iterator[Problem]:
    """Saved inputs are cut over tensor parallelism where they are whole on every rank."""
    tp, hidden, what = c["layout.tensor_model_parallel_size"], c["model.hidden_size"], c.flag_text(DISTRIBUTE)
    if not c[DISTRIBUTE] or c.invalid & {GRANULARITY, "layout.tensor_model_parallel_size"}:
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


def compiled_recompute(c: ConfigCheck) -> Iterator[Problem]:
    """Nothing makes sure that a compiled attention draws the same mask twice."""
    fused = c["model.fused_attention_dropout"] and c["model.attention_dropout"] > 0.0
    if c[GRANULARITY] == "selective" and c["batch.compile"] and fused:
        rule = "cannot go with `--compile` and `--fused-attention-dropout`: its second run would have to draw the same mask"
        yield Problem(c.flag_text(GRANULARITY), rule, "--recompute-granularity full, or leave one of them out")


RULES = Rules(every_run=(recompute_method, distributed_activations, compiled_recompute))
