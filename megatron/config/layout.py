"""Settings of the layout: how the ranks are arranged. The rules of its pipeline flags stand in `pipeline.py`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import lcm

from megatron.config.batch import global_batch, ramp_up
from megatron.config.check import ConfigCheck, Rules, divisors
from megatron.config.errors import Problem
from megatron.config.option import LAYERS, NOT_NEGATIVE, POSITIVE, option
from megatron.pipeline.schedules.schedule import DEFAULT, DEFAULT_WITH_CHUNKS, SCHEDULES


@dataclass(frozen=True)
class LayoutSettings:
    """Arrangement of the ranks. Data parallelism takes what the other axes leave of the world."""

    tensor_model_parallel_size: int = option(1, "ranks that share each layer (tp); keep them within a node", legal=POSITIVE)
    pipeline_model_parallel_size: int = option(1, "ranks that share the depth (pp)", legal=POSITIVE)
    context_parallel_size: int = option(1, "ranks that share each sequence (cp)", legal=POSITIVE)
    sequence_parallel: bool = option(False, "split norms and dropout over the sequence within tp (arXiv 2205.05198)")
    pipeline_schedule: str | None = option(
        None,
        f"order of work in the pipeline; default {DEFAULT}, or {DEFAULT_WITH_CHUNKS} with virtual stages",
        choices=tuple(SCHEDULES),
    )
    num_layers_per_virtual_pipeline_stage: int | None = option(
        None, "layers of one virtual stage, about: each rank has num-layers / (pp x this) of them, rounded down", legal=POSITIVE
    )
    num_virtual_stages_per_pipeline_rank: int | None = option(
        None, "virtual stages of each rank, in place of --num-layers-per-virtual-pipeline-stage", legal=LAYERS
    )
    pipeline_stage_layers: tuple[int, ...] = option(
        (), "layers of each stage, first to last; default cut so that the ranks have equal work, the head's included", nargs="*"
    )
    pipeline_model_parallel_layout: str | None = option(
        None,
        "the same, drawn: stages between |, of E (embedding), t (layer), L (loss); x*3 is xxx, (tt|)*2 is tt|tt|",
        metavar='"Et*3|(tt|)*2L"',
    )
    decoder_first_pipeline_num_layers: int | None = option(
        None, "layers of the first pipeline rank, in all its stages; the other ranks share the rest evenly", legal=POSITIVE
    )
    decoder_last_pipeline_num_layers: int | None = option(None, "layers of the last pipeline rank, likewise", legal=POSITIVE)
    account_for_embedding_in_pipeline_split: bool = option(
        False, "even stages, in which the embedding counts as a layer: the first one has one less"
    )
    account_for_loss_in_pipeline_split: bool = option(
        False, "even stages, in which output layer and loss count as a layer: the last one has one less"
    )
    use_distributed_optimizer: bool = option(
        False, "each data-parallel rank keeps a slice of main weights and optimizer state (ZeRO-1, arXiv 1910.02054)"
    )
    overlap_grad_reduce: bool = option(
        False, "sum gradients over data-parallel ranks bucket by bucket, while the backward pass makes the others"
    )
    overlap_param_gather: bool = option(
        False, "of the distributed optimizer: gather new weights bucket by bucket, while the next forward pass runs"
    )
    ddp_bucket_size: int = option(
        40_000_000, "elements of a bucket of gradients; a larger parameter has one of its own", legal=POSITIVE
    )
    distributed_backend: str | None = option(
        None, "communication library; default nccl with one GPU per rank, else gloo", choices=("nccl", "gloo")
    )
    distributed_timeout_minutes: float = option(10.0, "a collective that takes longer is a failure", legal=POSITIVE)
    hang_timeout_seconds: float = option(
        20.0,
        "pipeline work counts as hanging after this, or after three times the longest of its kind so far, the first under "
        "--compile excepted; 0: only after --distributed-timeout-minutes",
        legal=NOT_NEGATIVE,
    )


@dataclass(frozen=True, kw_only=True)
class LayoutConfig(LayoutSettings):
    """Arrangement of the ranks of a run, with its schedule."""

    pipeline_schedule: str = field()


def data_parallel_size(layout: LayoutSettings, world_size: int) -> int | None:
    """Return what the other axes leave of the world; None where they do not divide it."""
    model = layout.tensor_model_parallel_size * layout.pipeline_model_parallel_size * layout.context_parallel_size
    return world_size // model if model > 0 and world_size >= model and world_size % model == 0 else None


def tensor_split(c: ConfigCheck) -> Iterator[Problem]:
    """Heads, groups and MLP width split evenly over tensor parallelism; with it the sequence, where that is split."""
    tp = c["layout.tensor_model_parallel_size"]
    names = ["model.num_attention_heads", "model.ffn_hidden_size"]
    if c.is_set("model.num_query_groups"):
        names.append("model.num_query_groups")
    if c["layout.sequence_parallel"]:
        names.append("data.seq_length")
    for name in names:
        if c[name] and c[name] % tp:
            why = " under `--sequence-parallel`" if name == "data.seq_length" else ""
            rule = f"is not divisible by `--tensor-model-parallel-size {tp}`{why}"
            yield Problem(c.flag_text(name), rule, divisors(c[name]))


def world_size(c: ConfigCheck) -> Iterator[Problem]:
    """The axes other than data parallelism divide the world."""
    names = ["layout.tensor_model_parallel_size", "layout.pipeline_model_parallel_size", "layout.context_parallel_size"]
    if c.dp is None and c.world > 0 and not c.invalid & set(names):
        sizes = [name for name in names if c[name] != 1]
        size = c[names[0]] * c[names[1]] * c[names[2]]
        of = f" = {size}" if len(sizes) > 1 else ""
        ranks = fitting_ranks(c, size)
        legal = f"multiples of {size}" + (f", such as {ranks}" if ranks else "") + (" (--world-size)" if c.planning else "")
        yield Problem(f"world size {c.world}", f"is not divisible by {c.flag_text(*sizes)}{of}", legal, ranks)


def fitting_ranks(c: ConfigCheck, size: int) -> int:
    """The number of ranks nearest to the world's, not above where that can be, over which the batch divides too; 0 for none.

    size: ranks that one copy of the model takes.
    """
    nearest = max(1, c.world // size)
    for copies in (*range(nearest, 0, -1), *range(nearest + 1, nearest + 65)):
        resolved = c.derive(c.raw, size * copies)
        fewer = dataclasses.replace(c, resolved=resolved, world=size * copies, dp=copies)
        if not [*global_batch(fewer), *ramp_up(fewer)]:
            return fewer.world
    return 0


def context_split(c: ConfigCheck) -> Iterator[Problem]:
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


def context_dropout(c: ConfigCheck) -> Iterator[Problem]:
    """Attention around the ring has no fused kernel, so nothing that could draw by itself."""
    fused = c["model.fused_attention_dropout"] and c["model.attention_dropout"] > 0
    if fused and c["layout.context_parallel_size"] > 1:
        rule = f"cannot go with {c.flag_text('layout.context_parallel_size')}, whose attention has no kernel that draws numbers"
        yield Problem(c.flag_text("model.fused_attention_dropout"), rule, "leave it out, or --attention-dropout 0")


def param_gather(c: ConfigCheck) -> Iterator[Problem]:
    """Weights are gathered where each rank has updated a slice of them, before uncompiled layers."""
    if not c["layout.overlap_param_gather"]:
        return
    if not c["layout.use_distributed_optimizer"]:
        yield Problem(
            c.flag_text("layout.overlap_param_gather"),
            "needs `--use-distributed-optimizer`: without it every rank updates all its weights",
        )
    if c["batch.compile"]:
        yield Problem(
            c.flag_text("layout.overlap_param_gather"),
            "cannot go with `--compile`, whose layers do not wait for their weights; leave one out",
        )


def remarks(c: ConfigCheck) -> Iterator[str]:
    """Yield what was asked of the layout and has no effect."""
    if c.raw.layout.sequence_parallel and not c["layout.sequence_parallel"]:
        yield "--sequence-parallel changes nothing: --tensor-model-parallel-size is 1"


RULES = Rules(every_run=(tensor_split, world_size, context_split, context_dropout, param_gather), remarks=(remarks,))
