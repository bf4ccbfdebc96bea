"""A legal pretraining command, carried out: tokenizer, checkpoint, data, then the job itself.

What can be wrong with them is found before any process group forms, and said once, by the first rank, in words.
"""

from __future__ import annotations

import math
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TextIO

from megatron.checkpoint.layout import CheckpointError
from megatron.checkpoint.save import save
from megatron.config.cli import Parsed, explain, to_json
from megatron.config.errors import ConfigError
from megatron.config.schema import RunConfig
from megatron.data.batch import GPTBatches
from megatron.data.build import build_datasets
from megatron.data.errors import DataError
from megatron.data.gpt import SampleSource
from megatron.data.loader import Loader
from megatron.data.tokenizer import Tokenizer, build_tokenizer
from megatron.dryrun import stage_table
from megatron.mesh.beats import Patience
from megatron.mesh.launch import Job, job
from megatron.mesh.place import Place
from megatron.model.size import flops_per_token, padded_vocabulary
from megatron.stages import stages_of
from megatron.train.errors import TrainingError
from megatron.train.loop import Exit, Surroundings, held_out, train
from megatron.train.pipeline_profile import ProfiledStep
from megatron.train.report import peak_tflops
from megatron.train.resume import Source, check_source, choose_schedule, differences, find_source, restore
from megatron.train.run import Run, build, grid_of, sample_counts
from megatron.train.sinks import open_sinks


@dataclass(frozen=True)
class Prepared:
    """What a rank finds out for itself, before any other is needed. datasets: training, validation, test."""

    config: RunConfig
    notes: tuple[str, ...]
    tokenizer: Tokenizer
    source: Source
    datasets: tuple[SampleSource | None, SampleSource | None, SampleSource | None]
    batches: GPTBatches


def start(parsed: Parsed, place: Place, program: str, began: float) -> int:
    """Prepare, then run the job; the exit status of the contract. began: of the program, `time.monotonic()`."""
    first = place.rank == 0
    try:
        prepared = prepare(parsed)
    except ConfigError as error:
        explain(error, program, place.rank)
    except (DataError, CheckpointError) as error:
        return fail(f"error: {error}", 2, first)
    layout = prepared.config.layout
    try:
        hang = layout.hang_timeout_seconds or math.inf
        patience = Patience(hang=hang, first=math.inf if prepared.config.batch.compile else hang)
        timeout = layout.distributed_timeout_minutes
        with job(place, layout.distributed_backend, timeout, explain=in_words, patience=patience) as started:
            return run_job(prepared, started, began)
    except KeyboardInterrupt:
        return fail("interrupted", 130, first)
    except Exception as error:  # of several ranks only what no watch saw: they did not find one another
        where = f"rank {place.rank}"
        words = in_words(error, where)
        return fail(
            f"error: {words}" if words else f"{traceback.format_exc()}error: {where}: {type(error).__name__}: {error}", 1
        )


def in_words(error: BaseException, where: str) -> str | None:
    """What to say of an error that needs no traceback. where: rank, host and phase, for one that may be this rank's alone."""
    if isinstance(error, TrainingError | CheckpointError):  # the same on all ranks
        return str(error)
    return f"{where}: {error}" if isinstance(error, DataError) else None


def fail(message: str, status: int, speak: bool = True) -> int:
    """Say why, and give the exit status."""
    if speak:
        print(message, file=sys.stderr, flush=True)
    return status


def prepare(parsed: Parsed) -> Prepared:
    """Tokenizer, checkpoint to start from, datasets. ConfigError, DataError or CheckpointError says what is wrong."""
    config = parsed.config
    tokenizer = build_tokenizer(config.tokenizer)
    config = replace(config, model=replace(config.model, vocab_size=tokenizer.vocab_size))
    source = find_source(config.checkpoint)
    check_source(source, config)
    batches = GPTBatches.of(config.data, tokenizer.vocab_size, tokenizer.special.get("eod"))
    datasets = build_datasets(config.data, config.batch.seed, sample_counts(config), tokenizer)
    if datasets[0] is None and not config.eval.skip_train:
        raise DataError(
            "there is nothing to train on: give --split a share for training, or --train-data-path; --skip-train only evaluates"
        )
    return Prepared(config, parsed.notes, tokenizer, source, datasets, batches)


def run_job(prepared: Prepared, started: Job, began: float) -> int:
    """Build the run, restore it, train, evaluate. Collective."""
    config, source = prepared.config, prepared.source
    out = sys.stdout if started.is_main else None
    announce(prepared, started, out)
    run = build(config, started, schedule=choose_schedule(source, config))
    restore(source, run)
    say(out, f"> parameters: {sum(p.numel() for b in run.optimizer.buffers for p in b.parameters)} on this rank, with padding")
    if source.progress and not config.eval.skip_train and run.state.iteration >= (config.batch.train_iters or 0):
        say(out, f"iteration {run.state.iteration} is the last one already: nothing is left to train")
        return Exit.FINISHED
    if config.log.profile_pipeline is not None:
        run.step = ProfiledStep(run, Path(config.log.profile_pipeline), partial(say, out))
    training, validation, test = openers(run, prepared)
    # Lines of this very run beyond the checkpoint will be written again; another run's are left alone.
    root = None if source.directory is None else source.directory.resolve().parent
    own = source.progress and config.checkpoint.save is not None and root == Path(config.checkpoint.save).resolve()
    around = Surroundings(
        None if training is None or config.eval.skip_train else training(),
        validation,
        test,
        sinks=open_sinks(config.log, out, resume_at=run.state.iteration if own else None) if out is not None else [],
        save=saver(run, prepared.tokenizer, out) if config.checkpoint.save is not None else None,
        flops=sample_flops(config),
        peak_tflops=peak_tflops(started.device, config.log.peak_tflops),
        began=began,
    )
    try:
        status = train(run, around) if around.train is not None else Exit.FINISHED
        if status is Exit.FINISHED:
            final_evaluations(run, around)
    finally:
        if around.train is not None:
            around.train.close()
        for sink in around.sinks:
            sink.close()
    # Without a checkpoint there is nothing to go on from, so the stop is the end.
    return status if around.save is not None else Exit.FINISHED


def say(out: TextIO | None, *lines: str) -> None:
    for line in lines:
        if out is not None:
            print(line, file=out, flush=True)


def announce(prepared: Prepared, started: Job, out: TextIO | None) -> None:
    """The first lines of a run: where its state comes from, what it runs on, how it is laid out."""
    config, source = prepared.config, prepared.source
    layout, vocab = config.layout, config.model.size("vocab_size")
    tp, pp = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size
    padded = padded_vocabulary(config.model, vocab, tp)
    say(
        out,
        *source.lines,
        *differences(source, config),
        *prepared.notes,
        started.describe(),
        f"using world size: {started.place.world_size}, data-parallel-size: {started.place.world_size // (tp * pp)}, "
        f"tensor-model-parallel size: {tp}, pipeline-model-parallel size: {pp} ",
        f" > padded vocab (size: {vocab}) with {padded - vocab} dummy tokens (new size: {padded})",
        *stage_table(config, grid_of(layout, started.place.world_size), stages_of(config)),
    )


Opener = Callable[[], Loader] | None


def openers(run: Run, prepared: Prepared) -> tuple[Opener, Opener, Opener]:
    """What opens each split: training at the run's position, the held-out ones at their beginning."""
    data, batch, dp = run.config.data, run.config.batch, run.mesh.dp

    def of(dataset: SampleSource | None, name: str, consumed: int = 0, *, cyclic: bool = False) -> Opener:
        if dataset is None:
            return None
        return lambda: Loader(
            dataset,
            prepared.batches,
            dp.rank,
            dp.size,
            batch.micro_batch_size or 1,
            consumed,
            read_ahead=data.num_workers,
            cyclic=cyclic,
            seed=batch.seed,
            pin_memory=run.job.device.type == "cuda",
            name=name,
        )

    training, validation, test = prepared.datasets
    return (
        of(training, "training", run.state.consumed_samples, cyclic=data.dataloader_type == "cyclic"),
        of(validation, "validation"),
        of(test, "test"),
    )


def sample_flops(config: RunConfig) -> float:
    """FLOPs of training on one sample."""
    seq_length = config.data.seq_length or 0
    return float(flops_per_token(config.model, config.model.size("vocab_size"), seq_length) * seq_length)


def saver(run: Run, tokenizer: Tokenizer, out: TextIO | None) -> Callable[[], None]:
    """A function that writes a checkpoint of the run as it is. Collective."""
    checkpoint = run.config.checkpoint

    def write() -> None:
        iteration, root = run.state.iteration, Path(checkpoint.save or ".")
        say(out, f"saving checkpoint at iteration {iteration:7d} to {root}")
        save(
            root,
            iteration,
            run.parts(optimizer=not checkpoint.no_save_optim),
            run.mesh,
            config=to_json(run.config),
            assets=tokenizer.save,
            keep_last=checkpoint.keep_last,
            keep_every=checkpoint.keep_every,
        )
        say(out, f"  successfully saved checkpoint at iteration {iteration:7d} to {root}")

    return write


def final_evaluations(run: Run, around: Surroundings) -> None:
    """Validation and test loss of the finished model."""
    size = run.config.eval.eval_iters * (run.config.batch.global_batch_size or 1)
    for samples, split in ((around.valid, "validation"), (around.test, "test")):
        if samples is not None:
            held_out(run, around, samples, split, f"iteration {run.state.iteration} on {size}-sample draw from {split} set")
