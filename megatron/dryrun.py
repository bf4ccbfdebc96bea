"""What a run would do, without doing it: `--dry-run` prints it for any number of ranks, in one CPU process.

Opens the tokenizer, the datasets and the checkpoint that the run names. Imports torch only to look at a checkpoint.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from megatron.config.batch_size import ramp_sizes, samples_for
from megatron.config.cli import Parsed, explain
from megatron.config.compare import different_model
from megatron.config.directories import traces
from megatron.config.errors import ConfigError, Problem
from megatron.config.options import by_name, say
from megatron.config.rules import TOKENIZER_FILES, prefixes
from megatron.config.saved import from_json, to_toml
from megatron.config.schedule_rules import uneven_ahead
from megatron.config.schema import ModelConfig, RunConfig
from megatron.data.errors import DataError
from megatron.data.indexed import IndexedDataset
from megatron.data.matching import check_tokenizer, chosen_for_data
from megatron.data.mock import MADE_UP
from megatron.data.tokenizer import Tokenizer, build_tokenizer
from megatron.mesh.grid import Grid
from megatron.model import flops, size
from megatron.pipeline.draw import draw_text
from megatron.pipeline.schedule import DEFAULT, Op, Schedule, make
from megatron.pipeline.simulate import MeasuredCosts, simulate
from megatron.stages import StagePlan, stages_of

GPT2_VOCABULARY = 50257
MEMORY = ("weights", "gradients", "optimizer", "activations", "total")

Look = Callable[[Parsed], tuple[RunConfig, list[str]]]


@dataclass(frozen=True)
class Found:
    """What lies on the disk: the size of the vocabulary and where it comes from; a line per dataset and checkpoint."""

    vocabulary: int
    source: str
    lines: tuple[str, ...]


def dry_run(parsed: Parsed, program: str, look: Look | None = None) -> int:
    """Print what `parsed` would run; the exit status. Mistakes in the files end the process with status 2.

    look: reads what a task's command names, in place of what a pretraining run reads; see `tasks.program.look`.
    """
    config = parsed.config
    try:
        if look is None:
            found = inspect(config, parsed.world_size)
        else:
            config, told = look(parsed)
            found = Found(config.model.size("vocab_size"), "the checkpoint's", tuple(told))
    except ConfigError as error:
        explain(error, program)
    lines = [f"note: {note}" for note in parsed.notes]
    again = replace(parsed.config, eval=config.eval)  # without the length, which follows from a task's files
    lines += ["# The resolved configuration, as a file for --config", to_toml(again)]
    sys.stdout.write("\n".join([*lines, *report(config, parsed.world_size, found)]) + "\n")
    return 0


def inspect(config: RunConfig, world_size: int = 1) -> Found:
    """Open everything that the run reads. ConfigError with all that is wrong."""
    problems: list[Problem] = []
    lines: list[str] = []
    tokenizer, count, source = None, GPT2_VOCABULARY, "GPT-2's, since no tokenizer files are named"
    kind = config.tokenizer.tokenizer_type
    missing = [by_name()[n].flag for n in TOKENIZER_FILES.get(kind or "", ()) if getattr(config.tokenizer, n[10:]) is None]
    if not missing:
        try:
            tokenizer = build_tokenizer(config.tokenizer)
            count, source = tokenizer.vocab_size, str(kind)
        except DataError as error:
            problems.append(Problem(say("tokenizer.tokenizer_type", kind), f"cannot be opened: {error}"))
    elif kind == "GPT2BPETokenizer":
        lines.append(f"a run also needs {' and '.join(missing)}")
    else:
        problems.append(Problem(say("tokenizer.tokenizer_type", kind), f"needs `{missing[0]}`, also to know its size"))
    lines += _datasets(config, tokenizer, problems)
    if config.checkpoint.load is not None or (config.checkpoint.save is not None and traces(Path(config.checkpoint.save))):
        lines += _checkpoint(config, world_size, problems)
    else:
        problems += uneven_ahead(config, world_size, 0)
    if problems:
        raise ConfigError(problems)
    return Found(count, source, tuple(lines))


def _datasets(config: RunConfig, tokenizer: Tokenizer | None, problems: list[Problem]) -> list[str]:
    lines = []
    if tokenizer is not None:
        with suppress(DataError):  # said of the dataset below
            lines += chosen_for_data(config.data, config.tokenizer, tokenizer)[1]
    for name in ("data_path", "train_data_path", "valid_data_path", "test_data_path"):
        for prefix in prefixes(getattr(config.data, name)) or ():
            try:
                dataset = IndexedDataset(prefix)
                if tokenizer is not None:
                    check_tokenizer(dataset, tokenizer)
                lines.append(f"dataset {dataset.prefix}: {dataset.document_count:,} documents, {dataset.token_count:,} tokens")
            except DataError as error:
                problems.append(Problem(say(f"data.{name}", (prefix,)), f"cannot be opened: {error}"))
    if config.data.mock_data:
        return [MADE_UP]
    return lines or ["a run also needs --data-path"]


def _checkpoint(config: RunConfig, world_size: int, problems: list[Problem]) -> list[str]:
    from megatron.checkpoint.layout import CheckpointError, read_config
    from megatron.train.resume import find_source, weights_alone
    from megatron.train.resumed_schedule import check_schedule
    from megatron.train.save_directory import check_save

    what = say("checkpoint.load", config.checkpoint.load)
    try:
        source = find_source(replace(config.checkpoint, auto_resume=False))
        lines = check_save(source, config)
        if not config.checkpoint.auto_resume:
            problems += uneven_ahead(config, world_size, source.state.consumed_samples if source.progress else 0)
        if source.directory is None:
            return [*source.lines[:-1], *lines]
        if not config.checkpoint.auto_resume:
            check_schedule(source, config)
        held = from_json(read_config(source.directory)).model
        problems.extend(weights_alone(source))
    except CheckpointError as error:
        problems.append(Problem(what, f"cannot be loaded: {error}"))
        return []
    except ConfigError as error:
        problems.extend(error.problems)
        return []
    problems.extend(different_model(held, config.model, str(source.directory)))
    return [*source.lines[:-1], *lines, f"checkpoint {source.directory}: complete"]


def report(config: RunConfig, world: int, found: Found) -> Iterator[str]:
    """The lines of a dry run that follow the configuration."""
    config = replace(config, model=replace(config.model, vocab_size=found.vocabulary))
    layout = config.layout
    tp, pp, cp = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size, layout.context_parallel_size
    grid = Grid(pp=pp, dp=world // (tp * pp * cp), cp=cp, tp=tp)
    yield f"# {world} ranks: tensor {tp} x pipeline {pp} x context {cp} x data {grid.dp}"
    yield from found.lines
    padded = size.padded_vocabulary(config.model, found.vocabulary, tp)
    yield f"vocabulary: {found.vocabulary} → {padded}, {padded - found.vocabulary} padding rows ({found.source})"
    yield ""
    plan = stages_of(config)
    micro_batches = max(ramp_sizes(config.batch)) // ((config.batch.micro_batch_size or 1) * grid.dp)
    schedule = make(layout.pipeline_schedule or DEFAULT, pp, micro_batches, plan.chunks)
    yield from stage_table(config, grid, plan)
    if config.task.task is not None and config.model.task_head is None:  # the rest is about training
        return
    yield ""
    yield from _memory(config, grid, plan, schedule)
    yield ""
    yield from _batches(config, grid, micro_batches)
    yield ""
    yield from _schedule(config, plan, schedule)


def _ranks(grid: Grid, rank: int) -> str:
    """The ranks of the job that are pipeline rank `rank`: neighbours, since the pipeline is the slowest axis."""
    first, count = grid.rank(pp=rank), grid.world_size // grid.pp
    return f"{first}-{first + count - 1}" if count > 1 else str(first)


def stage_table(config: RunConfig, grid: Grid, plan: StagePlan) -> Iterator[str]:
    """A row for each stage. A tied word embedding counts on each rank that holds it, and in all once."""
    model, vocab = config.model, config.model.size("vocab_size")
    yield f"# Parameters: {size.parameters(model, vocab):,} in all, without padding"
    yield f"{'stage':>5} {'ranks':>11} {'layers':>9} {'ends':>16} {'parameters':>16} {'of each rank':>16} {'weight bytes':>16}"
    held: set[tuple[int, str]] = set()
    for stage, (rank, part) in enumerate(zip(plan.placement, plan.parts, strict=True)):
        own = [p for p in size.parameter_list(model, vocab, part) if (rank, p.name) not in held]
        held |= {(rank, p.name) for p in own}
        layers = f"{part.layers.start}-{part.layers.stop - 1}" if part.layers else "none"
        ends = ", ".join(name for name, here in (("embedding", part.embedding), ("head", part.head)) if here)
        count, local = sum(p.count for p in own), sum(p.local(model, grid.tp) for p in own)
        weights = size.state_of(model, own, grid.tp, two_bytes=config.precision.two_bytes, shards=shards(config, grid)).weights
        yield f"{stage:>5} {_ranks(grid, rank):>11} {layers:>9} {ends:>16} {count:>16,} {local:>16,} {weights:>16,}"


def shards(config: RunConfig, grid: Grid) -> int:
    """Ranks that each own a slice of main weights and optimizer state."""
    return grid.dp * grid.cp if config.layout.use_distributed_optimizer else 1


def _memory(config: RunConfig, grid: Grid, plan: StagePlan, schedule: Schedule) -> Iterator[str]:
    """What each pipeline rank holds at its fullest, and the fullest of them in detail."""
    every = [memory_of(config, grid.tp, plan, schedule, rank, shards(config, grid)) for rank in range(grid.pp)]
    fullest = max(range(grid.pp), key=lambda rank: every[rank].total)
    which = "each rank" if grid.pp == 1 else f"the fullest ranks, {_ranks(grid, fullest)}"
    yield f"# Memory of {which}, bytes (activations are an estimate, after arXiv 2205.05198)"
    for name in MEMORY:
        value = getattr(every[fullest], name)
        yield f"{name:<12} {value:>18,}  ({value / 2**30:.2f} GiB)"
    if grid.pp > 1:
        yield ""
        yield f"{'ranks':>11}" + "".join(f" {name:>18}" for name in MEMORY)
        for rank, memory in enumerate(every):
            yield f"{_ranks(grid, rank):>11}" + "".join(f" {getattr(memory, name):>18,}" for name in MEMORY)


def memory_of(config: RunConfig, tp: int, plan: StagePlan, schedule: Schedule, rank: int, owners: int = 1) -> size.Memory:
    """What each rank of pipeline rank `rank` holds when its activations take most. owners: of a slice of the state each.

    Those of a stage and micro-batch are there from its F until its B or W.
    """
    model, vocab, batch = config.model, config.model.size("vocab_size"), config.batch
    seq, bf16, sequence_parallel = config.data.seq_length or 0, config.precision.two_bytes, config.layout.sequence_parallel
    cp, rows = config.layout.context_parallel_size, (batch.micro_batch_size or 0) * model.rows

    @cache
    def activations(stage: int, waiting: int, split: int) -> size.Activations:
        counts = (model, vocab, tp, seq, rows, bf16, sequence_parallel, plan.parts[stage], waiting, config.memory, cp, split)
        return size.activations_of(*counts)

    own = plan.of_rank(rank)
    held, split = dict.fromkeys(own, 0), dict.fromkeys(own, 0)
    most, then = 0, (dict(held), dict(split))
    for action in schedule.programs[rank]:
        held[action.stage] += {Op.F: 1, Op.I: 0, Op.B: -1, Op.W: -1}[action.op]
        split[action.stage] += {Op.F: 0, Op.I: 1, Op.B: 0, Op.W: -1}[action.op]
        counted = [activations(stage, held[stage], split[stage]) for stage in own]
        now = sum(a.kept for a in counted) + max(a.passing for a in counted)
        if now > most:
            most, then = now, (dict(held), dict(split))
    return size.memory_per_rank(
        model,
        vocab,
        tp=tp,
        seq=seq,
        micro_batch=rows,
        bf16=bf16,
        sequence_parallel=sequence_parallel,
        optimizer=config.optim.optimizer,
        stages=[plan.parts[stage] for stage in own],
        in_flight=[then[0][stage] for stage in own],
        split=[then[1][stage] for stage in own],
        cp=cp,
        memory=config.memory,
        bucket=config.layout.ddp_bucket_size,
        shards=owners,
        bf16_gradients=config.precision.grad_reduce_in_bf16,
    )


def _batches(config: RunConfig, grid: Grid, micro_batches: int) -> Iterator[str]:
    batch, seq, vocab = config.batch, config.data.seq_length or 0, config.model.size("vocab_size")
    full = max(ramp_sizes(batch))
    rows = full * config.model.rows
    yield "# Batches"
    sizes = ramp_sizes(batch)
    for begin, now in zip(batch.batch_size_steps[::2], sizes, strict=False):
        yield f"global batch {now} from sample {begin:,} on ({begin * seq:,} tokens)"
    if len(sizes) > 1 and batch.rampup_batch_size:
        shown = ", ".join(map(str, sizes[:6])) + (", ..." if len(sizes) > 6 else "")
        yield f"global batch grows over {batch.rampup_batch_size[2]:,} samples: {shown} to {full}"
    micro = f"micro-batch {batch.micro_batch_size} x {micro_batches} micro-batches"
    yield f"global batch {full} = {micro} x {grid.dp} data-parallel ranks"
    if batch.train_iters is not None:
        samples = batch.train_samples if batch.train_samples is not None else samples_for(batch, batch.train_iters)
        yield f"{batch.train_iters:,} iterations, {samples:,} samples, {samples * config.model.rows * seq:,} tokens"
    total = flops.flops_per_iteration(config.model, vocab, seq, rows)
    per_token = flops.flops_per_token(config.model, vocab, seq)
    yield f"{total:.4g} FLOPs an iteration, {total / grid.world_size:.4g} on each rank, {per_token:.4g} a token"
    yield flops_in_words(config.model, vocab, seq)


def flops_in_words(model: ModelConfig, vocab: int, seq: int) -> str:
    """By which convention FLOPs are counted, and what a token takes by it and by the other one."""
    whole, causal = flops.flops_per_token(model, vocab, seq), flops.causal_flops_per_token(model, vocab, seq)
    text = f"attention counts over the whole square, {whole / 1e9:.4g} GFLOP a token"
    if causal is None:
        return text
    return f"{text}; NVIDIA's tables count its causal half, {causal / 1e9:.4g}, which is {causal / whole:.1%} of that"


def _schedule(config: RunConfig, plan: StagePlan, schedule: Schedule) -> Iterator[str]:
    """The schedule of a full global batch: what it idles and holds, and its picture."""
    yield "# Schedule, if FLOPs alone took time, in units of the mean stage's forward pass"
    yield draw_text(schedule, simulate(schedule, flop_costs(config, plan)))


def flop_costs(config: RunConfig, plan: StagePlan) -> MeasuredCosts:
    """The durations of all actions if FLOPs were all that takes time, in units of the mean stage's forward pass."""
    seq, vocab = config.data.seq_length or 0, config.model.size("vocab_size")
    stages = [flops.stage_flops(config.model, vocab, seq, part) for part in plan.parts]
    unit = sum(stage.forward for stage in stages) / len(stages)
    times: dict[tuple[Op, int], float] = {}
    for number, stage in enumerate(stages):
        times[Op.F, number] = stage.forward / unit
        times[Op.I, number] = stage.backward / unit
        times[Op.W, number] = stage.weight / unit
        times[Op.B, number] = (stage.backward + stage.weight) / unit
    return MeasuredCosts(times)
