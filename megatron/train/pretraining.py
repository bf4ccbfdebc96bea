"""A legal pretraining command, carried out: tokenizer, checkpoint, data, then the job itself.

What can be wrong with them is found before any process group forms, and said once, by the first rank, in words.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
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
from megatron.mesh.launch import Job, job
from megatron.mesh.place import Place
from megatron.model.size import flops_per_token, padded_vocabulary
from megatron.train.errors import TrainingError
from megatron.train.loop import Exit, Surroundings, held_out, train
from megatron.train.report import peak_tflops
from megatron.train.resume import Source, check_model, choose_schedule, differences, find_source, restore
from megatron.train.run import Run, build
from megatron.train.sinks import open_sinks

Datasets = tuple[SampleSource | None, SampleSource | None, SampleSource | None]


def start(parsed: Parsed, place: Place, program: str) -> int:
    """Prepare, then run the job; the exit status of the contract."""
    try:
        config, tokenizer, source, datasets = prepare(parsed)
    except ConfigError as error:
        explain(error, program, place.rank)
    except (DataError, CheckpointError) as error:
        return fail(f"error: {error}", 2, place.rank == 0)
    try:
        with job(place, config.layout.distributed_backend, config.layout.distributed_timeout_minutes) as started:
            return run_job(parsed, config, tokenizer, source, datasets, started)
    except (TrainingError, CheckpointError, DataError) as error:
        return fail(f"error: rank {place.rank}: {error}", 1)
    except KeyboardInterrupt:
        return fail("interrupted", 130, place.rank == 0)
    except Exception as error:
        return fail(f"{traceback.format_exc()}error: rank {place.rank}: {type(error).__name__}: {error}", 1)


def fail(message: str, status: int, speak: bool = True) -> int:
    """Say why, and give the exit status."""
    if speak:
        print(message, file=sys.stderr, flush=True)
    return status


def prepare(parsed: Parsed) -> tuple[RunConfig, Tokenizer, Source, Datasets]:
    """What needs no other rank: tokenizer, checkpoint to start from, datasets. Each rank does it for itself."""
    config = parsed.config
    tokenizer = build_tokenizer(config.tokenizer)
    config = replace(config, model=replace(config.model, vocab_size=tokenizer.vocab_size))
    source = find_source(config.checkpoint)
    check_model(source, config)
    return config, tokenizer, source, build_datasets(config.data, config.batch.seed, sample_counts(config), tokenizer)


def sample_counts(config: RunConfig) -> tuple[int, int, int]:
    """Samples that training, all validations and the test will read; Megatron-LM's rule."""
    size, steps = config.batch.global_batch_size or 1, config.batch.train_iters or 0
    evaluation = config.eval.eval_iters * size
    rounds = steps // config.eval.eval_interval + 1
    training = config.batch.train_samples if config.batch.train_samples is not None else steps * size
    return training, rounds * evaluation, evaluation


def run_job(
    parsed: Parsed, config: RunConfig, tokenizer: Tokenizer, source: Source, datasets: Datasets, started: Job
) -> int:
    """Build the run, restore it, train, evaluate. Collective."""
    out = sys.stdout if started.is_main else None
    announce(parsed, config, source, started, out)
    run = build(config, started, schedule=choose_schedule(source, config))
    restore(source, run)
    say(out, f"> parameters: {sum(p.numel() for p in run.model.parameters())} on this rank, with padding")
    loaders = open_loaders(run, datasets, tokenizer)
    resume_at = run.state.iteration
    around = Surroundings(
        *loaders,
        sinks=open_sinks(config.log, out, resume_at=resume_at) if out is not None else [],
        save=saver(run, tokenizer, out) if config.checkpoint.save is not None else None,
        flops=sample_flops(config),
        peak_tflops=peak_tflops(started.device, config.log.peak_tflops),
    )
    try:
        status = Exit.FINISHED if config.eval.skip_train else train(run, around)
        if status is Exit.FINISHED:
            final_evaluations(run, around)
    finally:
        for loader in loaders:
            if loader is not None:
                loader.close()
        for sink in around.sinks:
            sink.close()
    return int(status)


def say(out: TextIO | None, *lines: str) -> None:
    for line in lines:
        if out is not None:
            print(line, file=out, flush=True)


def announce(parsed: Parsed, config: RunConfig, source: Source, started: Job, out: TextIO | None) -> None:
    """The first lines of a run: where its state comes from, what it runs on, how it is laid out."""
    layout, vocab = config.layout, config.model.size("vocab_size")
    tp, pp = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size
    padded = padded_vocabulary(config.model, vocab, tp)
    say(
        out,
        *source.lines,
        *differences(source, config),
        *parsed.notes,
        started.describe(),
        f"using world size: {started.place.world_size}, data-parallel-size: {started.place.world_size // (tp * pp)}, "
        f"tensor-model-parallel size: {tp}, pipeline-model-parallel size: {pp} ",
        f" > padded vocab (size: {vocab}) with {padded - vocab} dummy tokens (new size: {padded})",
    )


def open_loaders(run: Run, datasets: Datasets, tokenizer: Tokenizer) -> tuple[Loader | None, Loader | None, Loader | None]:
    """Loaders of the three splits, at the run's position."""
    data, batch, dp = run.config.data, run.config.batch, run.mesh.dp

    def at(dataset: SampleSource | None, consumed: int, name: str, *, cyclic: bool = False) -> Loader | None:
        if dataset is None:
            return None
        return Loader(
            dataset,
            GPTBatches.of(data, tokenizer.vocab_size, tokenizer.special.get("eod")),
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

    training, validation, test = datasets
    return (
        at(training, run.state.consumed_samples, "training", cyclic=data.dataloader_type == "cyclic"),
        at(validation, run.state.consumed_valid_samples, "validation"),
        at(test, 0, "test"),
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
    samples = run.config.eval.eval_iters * (run.config.batch.global_batch_size or 1)
    for loader, split in ((around.valid, "validation"), (around.test, "test")):
        if loader is not None:
            held_out(run, around, loader, split, f"iteration {run.state.iteration} on {samples}-sample draw from {split} set")
