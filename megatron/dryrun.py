"""What a run would do, without doing it: `--dry-run` prints it for any number of ranks, in one CPU process.

Opens the tokenizer, the datasets and the checkpoint that the run names. Imports torch only to look at a checkpoint.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron.config.batch_size import micro_batch_count, ramp_sizes
from megatron.config.cli import Parsed, explain
from megatron.config.compare import different_model
from megatron.config.errors import ConfigError, Problem
from megatron.config.options import by_name, say
from megatron.config.rules import TOKENIZER_FILES, prefixes
from megatron.config.saved import from_json, to_toml
from megatron.config.schema import RunConfig
from megatron.data.build import check_tokenizer
from megatron.data.errors import DataError
from megatron.data.indexed import IndexedDataset
from megatron.data.tokenizer import Tokenizer, build_tokenizer
from megatron.mesh.grid import Grid
from megatron.model import size

GPT2_VOCABULARY = 50257
DRAWN = 8  # micro-batches of the schedule that are written out

@dataclass(frozen=True)
class Found:
    """What lies on the disk: the size of the vocabulary and where it comes from; a line per dataset and checkpoint."""

    vocabulary: int
    source: str
    lines: tuple[str, ...]


def dry_run(parsed: Parsed, program: str) -> int:
    """Print what `parsed` would run; the exit status. Mistakes in the files end the process with status 2."""
    try:
        found = inspect(parsed.config)
    except ConfigError as error:
        explain(error, program)
    lines = [f"note: {note}" for note in parsed.notes]
    sys.stdout.write("\n".join([*lines, *report(parsed.config, parsed.world_size, found)]) + "\n")
    return 0


def inspect(config: RunConfig) -> Found:
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
    if config.checkpoint.load is not None:
        lines += _checkpoint(config, problems)
    if problems:
        raise ConfigError(problems)
    return Found(count, source, tuple(lines))


def _datasets(config: RunConfig, tokenizer: Tokenizer | None, problems: list[Problem]) -> list[str]:
    lines = []
    for name in ("data_path", "train_data_path", "valid_data_path", "test_data_path"):
        for prefix in prefixes(getattr(config.data, name)) or ():
            try:
                dataset = IndexedDataset(prefix)
                if tokenizer is not None:
                    check_tokenizer(dataset, tokenizer)
                lines.append(f"dataset {dataset.prefix}: {dataset.document_count:,} documents, {dataset.token_count:,} tokens")
            except DataError as error:
                problems.append(Problem(say(f"data.{name}", (prefix,)), f"cannot be opened: {error}"))
    return lines or ["a run also needs --data-path"]


def _checkpoint(config: RunConfig, problems: list[Problem]) -> list[str]:
    from megatron.checkpoint.layout import CheckpointError, check_sizes, find, read_config, read_manifest

    what = say("checkpoint.load", config.checkpoint.load)
    try:
        directory = find(Path(config.checkpoint.load or "."), config.checkpoint.load_iteration)
        check_sizes(directory, read_manifest(directory))
        held = from_json(read_config(directory)).model
    except CheckpointError as error:
        problems.append(Problem(what, f"cannot be loaded: {error}"))
        return []
    except ConfigError as error:
        problems.extend(error.problems)
        return []
    problems.extend(different_model(held, config.model, str(directory)))
    return [f"checkpoint {directory}: complete"]


def report(config: RunConfig, world: int, found: Found) -> Iterator[str]:
    """The lines of a dry run."""
    yield "# The resolved configuration, as a file for --config"
    yield to_toml(config)
    layout = config.layout
    tp, pp, cp = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size, layout.context_parallel_size
    grid = Grid(pp=pp, dp=world // (tp * pp * cp), cp=cp, tp=tp)
    yield f"# {world} ranks: tensor {tp} x pipeline {pp} x context {cp} x data {grid.dp}"
    yield from found.lines
    padded = size.padded_vocabulary(config.model, found.vocabulary, tp)
    yield f"vocabulary: {found.vocabulary} → {padded}, {padded - found.vocabulary} padding rows ({found.source})"
    yield ""
    yield from _sizes(config, grid, found.vocabulary)
    yield ""
    yield from _batches(config, grid, found.vocabulary)


def _sizes(config: RunConfig, grid: Grid, vocab: int) -> Iterator[str]:
    model, seq = config.model, config.data.seq_length or 0
    yield f"# Parameters: {size.parameters(model, vocab):,} in all, without padding"
    yield f"{'stage':>5} {'ranks':>9} {'layers':>9} {'ends':>16} {'parameters':>16} {'of each rank':>16} {'weight bytes':>16}"
    stage = size.Whole(range(model.size("num_layers")))
    count = size.parameters(model, vocab, stage)
    memory = size.memory_per_rank(
        model,
        vocab,
        tp=grid.tp,
        seq=seq,
        micro_batch=config.batch.micro_batch_size or 0,
        bf16=config.precision.bf16,
        sequence_parallel=config.layout.sequence_parallel,
        optimizer=config.optim.optimizer,
        stage=stage,
    )
    held = size.parameters_per_rank(model, vocab, grid.tp, stage)
    layers, ranks = f"0-{len(stage.layers) - 1}", f"0-{grid.world_size - 1}"
    yield f"{0:>5} {ranks:>9} {layers:>9} {'embedding, head':>16} {count:>16,} {held:>16,} {memory.weights:>16,}"
    yield ""
    yield "# Memory of each rank, bytes (activations are an estimate, after arXiv 2205.05198)"
    for name in ("weights", "gradients", "optimizer", "activations", "total"):
        value = getattr(memory, name)
        yield f"{name:<12} {value:>18,}  ({value / 2**30:.2f} GiB)"


def _batches(config: RunConfig, grid: Grid, vocab: int) -> Iterator[str]:
    batch, seq = config.batch, config.data.seq_length or 0
    full = batch.global_batch_size or 0
    yield "# Batches"
    sizes = ramp_sizes(batch)
    if len(sizes) > 1:
        shown = ", ".join(map(str, sizes[:6])) + (", ..." if len(sizes) > 6 else "")
        yield f"global batch grows over {batch.rampup_batch_size[2]:,} samples: {shown} to {full}"
    count = micro_batch_count(batch, grid.dp, 0)
    final = full // ((batch.micro_batch_size or 1) * grid.dp)
    yield f"global batch {full} = micro-batch {batch.micro_batch_size} x {final} micro-batches x {grid.dp} data-parallel ranks"
    if batch.train_iters is not None:
        samples = batch.train_samples if batch.train_samples is not None else batch.train_iters * full
        yield f"{batch.train_iters:,} iterations, {samples:,} samples, {samples * seq:,} tokens"
    flops = size.flops_per_iteration(config.model, vocab, seq, full)
    per_token = size.flops_per_token(config.model, vocab, seq)
    yield f"{flops:.4g} FLOPs an iteration, {flops / grid.world_size:.4g} on each rank, {per_token:.4g} a token"
    yield ""
    yield f"# Schedule {config.layout.pipeline_schedule}: {count} micro-batches in the first step, forward (F) and backward (B)"
    drawn = " ".join(f"F{i} B{i}" for i in range(min(count, DRAWN)))
    yield f"stage 0 | {drawn}{' ...' if count > DRAWN else ''}"
