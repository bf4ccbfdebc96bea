"""Settings of the parallel layout: the sizes of the mesh's axes. The rules for the pipeline's flags are in `pipeline.py`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import lcm

from megatron.config.batch import global_batch, ramp_up
from megatron.config.check import ConfigCheck, Rules, divisors
from megatron.config.errors import Problem
from megatron.config.option import LAYERS, NOT_NEGATIVE, POSITIVE, option
from megatron.pipeline.schedules.schedule import DEFAULT_SCHEDULE, DEFAULT_WITH_CHUNKS, SCHEDULES


@dataclass(frozen=True)
class LayoutSettings:
    """Parallel layout. The data-parallel size is the world size divided by the sizes of the other axes."""

    tensor_model_parallel_size: int = option(
        1, "tensor-parallel ranks (tp), which share each layer; keep them within a node", legal=POSITIVE
    )
    pipeline_model_parallel_size: int = option(
        1, "pipeline-parallel ranks (pp), which share the layers in stages", legal=POSITIVE
    )
    context_parallel_size: int = option(1, "context-parallel ranks (cp), which share each sequence", legal=POSITIVE)
    sequence_parallel: bool = option(
        False, "shard norms and dropout along the sequence over the tensor-parallel ranks (arXiv 2205.05198)"
    )
    pipeline_schedule: str | None = option(
        None,
        f"pipeline schedule (default: {DEFAULT_SCHEDULE}, or {DEFAULT_WITH_CHUNKS} with virtual stages)",
        choices=tuple(SCHEDULES),
    )
    num_layers_per_virtual_pipeline_stage: int | None = option(
        None, "layers per virtual stage; a rank has num-layers / (pp x this) virtual stages, rounded down", legal=POSITIVE
    )
    num_virtual_stages_per_pipeline_rank: int | None = option(
        None, "virtual stages per rank, instead of --num-layers-per-virtual-pipeline-stage", legal=LAYERS
    )
    pipeline_stage_layers: tuple[int, ...] = option(
        (), "number of layers of each stage, first to last (default: equal work per rank, the output layer's included)"
    )
    pipeline_model_parallel_layout: str | None = option(
        None,
        "the stages as text: E (embedding), t (layer) and L (loss), separated by |; x*3 is xxx, (tt|)*2 is tt|tt|",
        metavar='"Et*3|(tt|)*2L"',
    )
    decoder_first_pipeline_num_layers: int | None = option(
        None, "layers of the first pipeline rank, over all its stages; the other ranks share the rest evenly", legal=POSITIVE
    )
    decoder_last_pipeline_num_layers: int | None = option(
        None, "layers of the last pipeline rank, over all its stages", legal=POSITIVE
    )
    account_for_embedding_in_pipeline_split: bool = option(
        False, "count the embedding as a layer when the stages are cut evenly: the first stage has one layer less"
    )
    account_for_loss_in_pipeline_split: bool = option(
        False, "count output layer and loss as a layer when the stages are cut evenly: the last stage has one layer less"
    )
    use_distributed_optimizer: bool = option(
        False, "shard main weights and optimizer state over the data-parallel ranks (ZeRO-1, arXiv 1910.02054)"
    )
    overlap_grad_reduce: bool = option(
        False, "reduce gradients over the data-parallel ranks bucket by bucket, during the backward pass"
    )
    overlap_param_gather: bool = option(
        False, "with the distributed optimizer: all-gather new weights bucket by bucket, during the next forward pass"
    )
    ddp_bucket_size: int = option(
        40_000_000, "elements per gradient bucket; a larger parameter has a bucket of its own", legal=POSITIVE
    )
    distributed_backend: str | None = option(
        None, "communication backend (default: nccl with one GPU per rank, else gloo)", choices=("nccl", "gloo")
    )
    shared_memory: bool = option(
        True,
        "shared memory between the CPU ranks of one host, so that all collectives go through gloo",
        off_flag="--no-shared-memory",
    )
    distributed_timeout_minutes: float = option(10.0, "minutes after which a collective counts as failed", legal=POSITIVE)
    hang_timeout_seconds: float = option(
        20.0,
        "seconds after which an action of the pipeline counts as hanging, or three times the longest of its kind, if that is "
        "more; the first under --compile is excepted; 0: only --distributed-timeout-minutes counts",
        legal=NOT_NEGATIVE,
    )


@dataclass(frozen=True, kw_only=True)
class LayoutConfig(LayoutSettings):
    """Resolved parallel layout of a run, with its pipeline schedule."""

    pipeline_schedule: str = field()


def data_parallel_size(layout: LayoutSettings, world_size: int) -> int | None:
    """Return the world size divided by the sizes of the other axes; None if they do not divide it."""
    replica = layout.tensor_model_parallel_size * layout.pipeline_model_parallel_size * layout.context_parallel_size
    return world_size // replica if replica > 0 and world_size >= replica and world_size % replica == 0 else None


def tensor_split(c: ConfigCheck) -> Iterator[Problem]:
    """Heads, query groups, MLP width and, with --sequence-parallel, the sequence are divisible by the tensor-parallel size."""
    tp = c["layout.tensor_model_parallel_size"]
    names = ["model.num_attention_heads", "model.ffn_hidden_size"]
    if c.is_set("model.num_query_groups"):  # by default, there are as many groups as heads
        names.append("model.num_query_groups")
    if c["layout.sequence_parallel"]:
        names.append("data.seq_length")
    for name in names:
        if c[name] and c[name] % tp:
            why = " under `--sequence-parallel`" if name == "data.seq_length" else ""
            rule = f"is not divisible by `--tensor-model-parallel-size {tp}`{why}"
            yield Problem(c.flag_text(name), rule, divisors(c[name]))


def world_size(c: ConfigCheck) -> Iterator[Problem]:
    """The world size is divisible by the product of the axes other than data parallelism."""
    names = ["layout.tensor_model_parallel_size", "layout.pipeline_model_parallel_size", "layout.context_parallel_size"]
    if c.dp is None and c.world_size > 0 and not c.invalid & set(names):
        sizes = [name for name in names if c[name] != 1]
        size = c[names[0]] * c[names[1]] * c[names[2]]
        product = f" = {size}" if len(sizes) > 1 else ""
        ranks = fitting_ranks(c, size)
        legal = f"multiples of {size}" + (f", such as {ranks}" if ranks else "") + (" (--world-size)" if c.planning else "")
        yield Problem(f"world size {c.world_size}", f"is not divisible by {c.flag_text(*sizes)}{product}", legal, ranks)


def fitting_ranks(c: ConfigCheck, size: int) -> int:
    """Return the number of ranks nearest to the world size that fits the layout and the batch; 0 if none is found.

    Smaller numbers are tried before larger ones.

    Args:
        c: the configuration.
        size: number of ranks of one replica of the model.
    """
    most = max(1, c.world_size // size)  # replicas for which there are enough ranks
    for replicas in (*range(most, 0, -1), *range(most + 1, most + 65)):
        resolved = c.derive(c.raw, size * replicas)  # the default global batch size depends on the number of ranks
        other = dataclasses.replace(c, resolved=resolved, world_size=size * replicas, dp=replicas)
        if not [*global_batch(other), *ramp_up(other)]:
            return other.world_size
    return 0


def context_split(c: ConfigCheck) -> Iterator[Problem]:
    """The sequence divides into two chunks per context-parallel rank, and each rank's part over sequence parallelism."""
    cp, tp, seq = c["layout.context_parallel_size"], c["layout.tensor_model_parallel_size"], c["data.seq_length"]
    if cp == 1 or not seq:
        return
    sequence_shards = tp if c["layout.sequence_parallel"] else 1
    # Rank r has chunks r and 2 cp - 1 - r of the 2 cp chunks, so that under the causal mask all ranks have the same work.
    divisor = cp * lcm(2, sequence_shards)
    if seq % divisor and not seq % sequence_shards:  # a length that tp does not divide is reported by `tensor_split`
        parts = f"2 x `--context-parallel-size {cp}`"
        if sequence_shards > 1:
            parts += f", of which `--sequence-parallel` cuts each rank's part over `--tensor-model-parallel-size {tp}`"
        yield Problem(
            c.flag_text("data.seq_length"), f"is not divisible by {divisor}: it is cut into {parts}", f"multiples of {divisor}"
        )


def context_dropout(c: ConfigCheck) -> Iterator[Problem]:
    """Fused attention dropout is not combined with context parallelism: ring attention has no kernel that draws the mask."""
    fused = c["model.fused_attention_dropout"] and c["model.attention_dropout"] > 0
    if fused and c["layout.context_parallel_size"] > 1:
        rule = f"conflicts with {c.flag_text('layout.context_parallel_size')}, whose attention has no kernel that draws masks"
        yield Problem(c.flag_text("model.fused_attention_dropout"), rule, "leave it out, or --attention-dropout 0")


def param_gather(c: ConfigCheck) -> Iterator[Problem]:
    """--overlap-param-gather needs the distributed optimizer, and layers that are not compiled."""
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
            "conflicts with `--compile`, whose layers do not wait for their weights; leave one out",
        )


def remarks(c: ConfigCheck) -> Iterator[str]:
    """Yield a remark for sequence parallelism without tensor parallelism."""
    if c.raw.layout.sequence_parallel and not c["layout.sequence_parallel"]:
        yield "--sequence-parallel changes nothing: --tensor-model-parallel-size is 1"


RULES = Rules(every_run=(tensor_split, world_size, context_split, context_dropout, param_gather), remarks=(remarks,))
