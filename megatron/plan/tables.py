"""The tables of a dry run: stages, memory, batches and schedule."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from megatron.config.batch import all_batch_sizes, samples_for
from megatron.config.schema import RunConfig
from megatron.mesh.grid import Grid
from megatron.parallel.embedding import padded_vocab_size
from megatron.pipeline.schedules.draw import draw_text
from megatron.pipeline.schedules.schedule import Schedule
from megatron.pipeline.schedules.simulate import simulate
from megatron.plan.flops import causal_flops_per_token, flops_per_token
from megatron.plan.memory import optimizer_shards, parameter_state, peak_memory
from megatron.plan.size import MetaModel
from megatron.plan.stages import StagePlan, build_schedule, plan_stages
from megatron.plan.time import flop_costs

MEMORY_COLUMNS = ("weights", "gradients", "optimizer", "activations", "total")


def report_plan(config: RunConfig, world_size: int, vocab_source: str, input_lines: Iterable[str]) -> Iterator[str]:
    """Yield the lines that a dry run prints after the configuration.

    Args:
        config: the run's configuration, with model.vocab_size set.
        world_size: the number of ranks.
        vocab_source: where the vocabulary's size comes from, as text.
        input_lines: lines about the files that the run will read.

    Raises:
        ConfigError: the schedule cannot be run.
    """
    layout, vocab = config.layout, config.model.known_vocab_size
    grid = Grid.from_layout(layout, world_size)
    yield f"# {world_size} ranks: tensor {grid.tp} x pipeline {grid.pp} x context {grid.cp} x data {grid.dp}"
    yield from input_lines
    padded = padded_vocab_size(vocab, grid.tp, config.model.make_vocab_size_divisible_by)
    yield f"vocabulary: {vocab} → {padded}, {padded - vocab} padding rows ({vocab_source})"
    yield ""
    plan = plan_stages(config)
    schedule = build_schedule(config, grid.dp)
    yield from stage_table(config, grid, plan)
    if config.task.task is not None and config.model.task_head is None:  # an evaluation: the rest is about training
        return
    yield ""
    yield from memory_table(config, grid, plan, schedule)
    yield ""
    yield from batch_table(config, grid, schedule.micro_batches)
    yield ""
    yield from schedule_table(config, plan, schedule)


def _rank_range(grid: Grid, pp_rank: int) -> str:
    """Return the global ranks of a pipeline rank as text, such as "8-15"."""
    # They are consecutive, since the pipeline is the slowest axis of the grid.
    first, count = grid.rank(pp=pp_rank), grid.world_size // grid.pp
    return f"{first}-{first + count - 1}" if count > 1 else str(first)


def stage_table(config: RunConfig, grid: Grid, plan: StagePlan) -> Iterator[str]:
    """Yield a row for each stage. A tied word embedding counts on each rank that holds it, but once in the total.

    Args:
        config: the run's configuration.
        grid: the grid of all ranks.
        plan: the run's stages.
    """
    model, shards = MetaModel.from_config(config), optimizer_shards(config, grid)
    yield f"# Parameters: {model.count():,} in all, without padding"
    yield f"{'stage':>5} {'ranks':>11} {'layers':>9} {'ends':>16} {'parameters':>16} {'of each rank':>16} {'weight bytes':>16}"
    counted: set[tuple[int, str]] = set()  # (pipeline rank, parameter name) of the rows so far
    for stage, (rank, part) in enumerate(zip(plan.placement, plan.parts, strict=True)):
        own = [p for p in model.parameters(part) if (rank, p.name) not in counted]
        counted |= {(rank, p.name) for p in own}
        layers = f"{part.layers.start}-{part.layers.stop - 1}" if part.layers else "none"
        ends = ", ".join(name for name, present in (("embedding", part.embedding), ("head", part.head)) if present)
        count, local = sum(p.count for p in own), sum(p.local for p in own)
        state = parameter_state(config, own, shards)
        yield f"{stage:>5} {_rank_range(grid, rank):>11} {layers:>9} {ends:>16} {count:>16,} {local:>16,} {state.weights:>16,}"


def memory_table(config: RunConfig, grid: Grid, plan: StagePlan, schedule: Schedule) -> Iterator[str]:
    """Yield the peak memory of the pipeline rank that needs most, then a row for each pipeline rank, in bytes.

    Args:
        config: the run's configuration.
        grid: the grid of all ranks.
        plan: the run's stages.
        schedule: the schedule of one step.
    """
    model, shards = MetaModel.from_config(config), optimizer_shards(config, grid)
    peaks = [peak_memory(config, model, plan, schedule, rank, shards) for rank in range(grid.pp)]
    fullest = max(range(grid.pp), key=lambda rank: peaks[rank].total)
    which = "each rank" if grid.pp == 1 else f"the fullest ranks, {_rank_range(grid, fullest)}"
    yield f"# Memory of {which}, bytes (activations are an estimate, after arXiv 2205.05198)"
    for name in MEMORY_COLUMNS:
        value = getattr(peaks[fullest], name)
        yield f"{name:<12} {value:>18,}  ({value / 2**30:.2f} GiB)"
    if grid.pp > 1:
        yield ""
        yield f"{'ranks':>11}" + "".join(f" {name:>18}" for name in MEMORY_COLUMNS)
        for rank, memory in enumerate(peaks):
            yield f"{_rank_range(grid, rank):>11}" + "".join(f" {getattr(memory, name):>18,}" for name in MEMORY_COLUMNS)


def batch_table(config: RunConfig, grid: Grid, micro_batches: int) -> Iterator[str]:
    """Yield the batch sizes of the run, its samples and tokens, and the FLOPs of an iteration.

    Args:
        config: the run's configuration.
        grid: the grid of all ranks.
        micro_batches: the number of micro-batches per data-parallel rank in a step with the full global batch.
    """
    batch, seq, model = config.batch, config.data.seq_length, MetaModel(config.model)
    full = max(all_batch_sizes(batch))
    rows = full * config.model.rows_per_sample
    yield "# Batches"
    sizes = all_batch_sizes(batch)
    for begin, size in zip(batch.batch_size_steps[::2], sizes, strict=False):
        yield f"global batch {size} from sample {begin:,} on ({begin * seq:,} tokens)"
    if len(sizes) > 1 and batch.rampup_batch_size:
        shown = ", ".join(map(str, sizes[:6])) + (", ..." if len(sizes) > 6 else "")
        yield f"global batch grows over {batch.rampup_batch_size[2]:,} samples: {shown} to {full}"
    micro = f"micro-batch {batch.micro_batch_size} x {micro_batches} micro-batches"
    yield f"global batch {full} = {micro} x {grid.dp} data-parallel ranks"
    if batch.train_iters is not None:
        samples = batch.train_samples if batch.train_samples is not None else samples_for(batch, batch.train_iters)
        yield f"{batch.train_iters:,} iterations, {samples:,} samples, {samples * config.model.rows_per_sample * seq:,} tokens"
    per_token = flops_per_token(model, seq)
    total = per_token * seq * rows
    yield f"{total:.4g} FLOPs per iteration, {total / grid.world_size:.4g} on each rank, {per_token:.4g} per token"
    yield describe_flops(model, seq)


def describe_flops(model: MetaModel, seq: int) -> str:
    """Return as one line the FLOPs per token, with attention counted over all positions and over the causal half."""
    whole, causal = flops_per_token(model, seq), causal_flops_per_token(model, seq)
    text = f"attention counts over the whole square, {whole / 1e9:.4g} GFLOP a token"
    if causal is None:
        return text
    return f"{text}; NVIDIA's tables count its causal half, {causal / 1e9:.4g}, which is {causal / whole:.1%} of that"


def schedule_table(config: RunConfig, plan: StagePlan, schedule: Schedule) -> Iterator[str]:
    """Yield the schedule of a full global batch: the idle share, the micro-batches in flight, and a drawing.

    Args:
        config: the run's configuration.
        plan: the run's stages.
        schedule: the schedule of one step.
    """
    yield "# Schedule, if FLOPs alone took time, in units of the mean stage's forward pass"
    yield draw_text(schedule, simulate(schedule, flop_costs(config, plan)))
