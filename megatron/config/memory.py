"""Settings of activation recomputation: which activations are stored for the backward pass, and which are recomputed in it."""

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
    """Activation recomputation (arXiv 2205.05198)."""

    recompute_granularity: str | None = option(
        None,
        "activations to recompute in the backward pass; selective: those of core attention; full: those of whole layers",
        choices=("full", "selective"),
        shortcuts={"--recompute-activations": "selective"},
    )
    recompute_method: str | None = option(
        None,
        "layers that granularity full recomputes; uniform: all, in chunks of --recompute-num-layers; block: the first "
        "--recompute-num-layers of each stage",
        choices=("uniform", "block"),
    )
    recompute_num_layers: int = option(
        1, "layers per recomputed chunk (uniform), or recomputed layers per stage (block)", legal=POSITIVE
    )
    distribute_saved_activations: bool = option(
        False, "with granularity full: shard the saved input of each chunk over the tensor-parallel ranks"
    )


def recompute_method(c: ConfigCheck) -> Iterator[Problem]:
    """Granularity full needs a method; with selective, or without recomputation, method and number of layers are not given."""
    if c.invalid & {GRANULARITY, METHOD}:
        return
    if c[GRANULARITY] == "full":
        if c[METHOD] is None:
            yield Problem(c.flag_text(GRANULARITY), "needs `--recompute-method`", "uniform, block")
        return
    for name in (METHOD, LAYERS):  # `is_set` ignores a default that the user spelled out, which is harmless here
        if not c.is_set(name) or name in c.invalid:
            continue
        if c[GRANULARITY] is None:
            yield Problem(c.flag_text(name), f"needs `{FULL}`")
        else:
            yield Problem(c.flag_text(name), f"conflicts with {c.flag_text(GRANULARITY)}, which applies to every layer", FULL)


def distributed_activations(c: ConfigCheck) -> Iterator[Problem]:
    """The saved inputs of chunks are sharded over the tensor-parallel ranks only if each rank would else store all of them."""
    tp, hidden, what = c["layout.tensor_model_parallel_size"], c["model.hidden_size"], c.flag_text(DISTRIBUTE)
    if not c[DISTRIBUTE] or c.invalid & {GRANULARITY, "layout.tensor_model_parallel_size"}:
        return
    if c[GRANULARITY] != "full":
        yield Problem(what, f"needs `{FULL}`: it shards the inputs of chunks of layers")
    if tp < 2:
        yield Problem(what, "needs `--tensor-model-parallel-size` of 2 or more: a single rank cannot share")
    elif c["layout.sequence_parallel"]:
        yield Problem(what, "conflicts with `--sequence-parallel`, which already shards these inputs; leave it out")
    elif hidden and hidden % tp:
        rule = f"is not divisible by {c.flag_text('layout.tensor_model_parallel_size')} under {what}"
        yield Problem(c.flag_text("model.hidden_size"), rule, divisors(hidden))


def compiled_recompute(c: ConfigCheck) -> Iterator[Problem]:
    """Selective recomputation is not combined with --compile if the attention kernel draws the dropout mask."""
    # The kernel draws from torch's generator, and a compiled graph does not restore the generator's state to recompute.
    fused = c["model.fused_attention_dropout"] and c["model.attention_dropout"] > 0.0
    if c[GRANULARITY] == "selective" and c["batch.compile"] and fused:
        rule = "conflicts with `--compile` and `--fused-attention-dropout`: the recomputation would draw another mask"
        yield Problem(c.flag_text(GRANULARITY), rule, "--recompute-granularity full, or leave one of them out")


RULES = Rules(every_run=(recompute_method, distributed_activations, compiled_recompute))
