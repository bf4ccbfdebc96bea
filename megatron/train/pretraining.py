"""A legal pretraining command, carried out: tokenizer, checkpoint, data, then the job itself.

What can be wrong with them is found before any process group forms, and said once, by the first rank, in words.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TextIO

import torch

from megatron.checkpoint.agreement import together
from megatron.checkpoint.layout import CheckpointError, announced
from megatron.checkpoint.side_files import carried
from megatron.config.command_line.parse import Parsed
from megatron.config.schema import RunConfig
from megatron.data.build import build_datasets
from megatron.data.gpt import SampleSource
from megatron.data.loader import Loader, MakeBatch
from megatron.data.matching import chosen_for_data
from megatron.data.mock import MADE_UP
from megatron.data.order import another_order, order_marks
from megatron.data.recipe import recipe_of
from megatron.data.tokenizer import Tokenizer, build_tokenizer
from megatron.launch.environment import Place
from megatron.launch.errors import Refused
from megatron.launch.job import Job
from megatron.launch.signals import StopSignals
from megatron.launch.watchdog import Watch
from megatron.mesh.grid import Grid
from megatron.parallel.collectives import all_reduce
from megatron.parallel.embedding import padded_vocabulary
from megatron.plan.enough_memory import check_memory
from megatron.plan.flops import causal_flops_per_token, flops_per_token
from megatron.plan.size import MetaModel
from megatron.plan.stages import stages_of
from megatron.plan.tables import flops_in_words, stage_table
from megatron.train.errors import TrainingError
from megatron.train.in_job import in_a_job, refusing, say
from megatron.train.loop import Exit, GiveUp, Surroundings, final_evaluations, finish, train
from megatron.train.pipeline_profile import ProfiledStep
from megatron.train.progress import EarlyStop, Progress
from megatron.train.report import peak_tflops
from megatron.train.resume import check_source, differences, find_source, restore, verify_source
from megatron.train.resumed_schedule import check_batch_sizes, check_schedule, choose_schedule, warning_of_rate_zero
from megatron.train.run import Run, build, sample_counts
from megatron.train.save_directory import begins_beside, check_save, set_metrics_aside, set_run_aside
from megatron.train.saving import Saver
from megatron.train.sinks import Ended, open_sinks
from megatron.train.source import Source
from megatron.train.stopping import Stopping
from megatron.train.wandb_sink import wandb_sink


@dataclass(frozen=True)
class Prepared:
    """What a rank finds out for itself, before any other is needed.

    datasets: training, validation, test. scorer: a run -> what is measured beside its validation loss, every score_interval
    iterations. finale: what follows training. again: what to say after `start again`, to go on.
    """

    config: RunConfig
    notes: tuple[str, ...]
    tokenizer: Tokenizer
    source: Source
    datasets: tuple[SampleSource | None, SampleSource | None, SampleSource | None]
    batches: MakeBatch
    scorer: Callable[[Run, Surroundings], Callable[[GiveUp], object]] | None = None
    score_interval: int | None = None
    finale: Callable[[Run, Surroundings], Exit] = final_evaluations
    again: str = "start again to go on"


def start(parsed: Parsed, place: Place, began: float, signals: StopSignals, early: EarlyStop) -> int:
    """Pretrain; see `run_prepared`."""
    return run_prepared(prepare, parsed, place, began, signals, early)


def run_prepared(
    prepare: Callable[[Parsed, Watch], Prepared],
    parsed: Parsed,
    place: Place,
    began: float,
    signals: StopSignals,
    early: EarlyStop,
) -> int:
    """Prepare, then run the job; the exit status of the contract.

    prepare: raises Refused. began: of the program, `time.monotonic()`. signals: what asks it to stop. early: its end, until
    the ranks have joined.
    """

    def run(prepared: Prepared, started: Job) -> int:
        signals.hold()
        return run_job(replace(prepared, again=early.again), started, began, signals, early.progress)

    def ready(watch: Watch) -> Prepared:
        prepared = prepare(parsed, watch)
        check_memory(prepared.config, place)
        return prepared

    config = parsed.config
    return in_a_job(
        ready,
        run,
        config.layout,
        place,
        signals,
        early,
        save=None if config.eval.skip_train else config.checkpoint.save,
        compiled=config.batch.compile,
    )


def prepare(parsed: Parsed, watch: Watch) -> Prepared:
    """Tokenizer, checkpoint to start from, datasets. Refused says what is wrong with one of them."""
    with refusing():
        config = parsed.config
        watch.waiting("reading the tokenizer")  # a phase without a limit: a large dataset takes its time
        tokenizer = build_tokenizer(config.tokenizer)
        chosen, lines = chosen_for_data(config.data, config.tokenizer, tokenizer)
        config = replace(config, tokenizer=chosen, model=replace(config.model, vocab_size=tokenizer.vocab_size))
        watch.waiting("looking for a checkpoint")
        source = find_source(config.checkpoint)
        check_source(source, config)
        check_schedule(source, config)
        check_batch_sizes(source, config, parsed.world_size)
        notes = (*parsed.notes, *lines, *check_save(source, config))
        watch.waiting("building the datasets")
        recipe = recipe_of(config.model, config.data, config.batch.seed, tokenizer)
        datasets = build_datasets(config.data, config.batch.seed, sample_counts(config), tokenizer, recipe.samples, recipe.mock)
        if config.data.mock_data:
            notes += (MADE_UP,)
    if datasets[0] is None and not config.eval.skip_train:
        raise Refused(
            "there is nothing to train on: give --split a share for training, or --train-data-path; --skip-train only evaluates"
        )
    return Prepared(config, notes, tokenizer, source, datasets, recipe.batches)


def run_job(prepared: Prepared, started: Job, began: float, signals: StopSignals, progress: Progress) -> int:
    """Build the run, restore it, train, evaluate. Collective."""
    prepared = replace(prepared, source=verify_source(prepared.source, prepared.config, started))
    config, source = prepared.config, prepared.source
    out, total = sys.stdout if started.is_main else None, config.batch.train_iters or 0
    announce(prepared, started, out)
    started.watch.waiting("building the model")
    run = build(config, started, schedule=choose_schedule(source, config))
    started.watch.waiting("loading the checkpoint")
    if new := restore(source, run):
        say(out, f"new, from the seed: {', '.join(new)}")
    if prepared.datasets[0] is not None:
        run.state.order = order_marks(prepared.datasets[0], sample_counts(config)[0], config.data, config.batch.seed)
    say(out, f"> parameters: {sum(p.numel() for b in run.optimizer.buffers for p in b.parameters)} on this rank, with padding")
    # Lines of this very run beyond the checkpoint will be written again; another run's are left alone.
    root = None if source.directory is None else source.directory.resolve().parent
    save = None if config.eval.skip_train else config.checkpoint.save  # an evaluation leaves all alone that lies there
    own = source.progress and save is not None and root == Path(save).resolve()
    first_start = config.checkpoint.auto_resume or config.checkpoint.load is not None
    own = own or (save is not None and first_start and root is None)  # this run, killed before its first checkpoint
    trained = source.progress and not config.eval.skip_train and run.state.iteration >= total
    if trained and (not own or first_says(run, progress.finished == run.state.iteration)):
        say(out, f"iteration {run.state.iteration} is the last one already: nothing is left to train")
        return Exit.FINISHED
    if config.checkpoint.overwrite and out is not None and config.log.metrics_path is not None:
        say(out, *filter(None, [set_metrics_aside(Path(config.log.metrics_path), config.checkpoint.save)]))
    if save is not None and begins_beside(source, config):
        aside = partial(set_run_aside, Path(save), config.log.metrics_path)
        say(out, *filter(None, [together(run.mesh.world, lambda: aside() if started.is_main else None)]))
    warning = None if config.eval.skip_train else warning_of_rate_zero(run.schedule, run.state, config.batch)
    say(out, *filter(None, [warning]))
    if config.log.profile_pipeline is not None:
        run.step = ProfiledStep(run, Path(config.log.profile_pipeline), partial(say, out))
    training, validation, test = openers(run, prepared)
    evaluated, at = not (run.state.evaluation_due or trained), run.state.iteration if own else None
    binary = config.model.predicts_order
    wandb = wandb_sink(run, save, own, source.directory is not None) if out is not None else None
    files = partial(carried, prepared.tokenizer, source.directory, partial(say, out))
    saver = Saver(run, files, partial(say, out)) if save is not None else None
    around = Surroundings(
        None if training is None or config.eval.skip_train else training(),
        validation,
        test,
        sinks=open_sinks(config.log, out, resume_at=at, evaluated=evaluated, binary=binary, wandb=wandb)
        if out is not None
        else [],
        saver=saver,
        flops=sample_flops(config),
        causal_share=causal_share(config),
        peak_tflops=peak_tflops(started.device, config.log.peak_tflops),
        stopping=Stopping(
            config, run.mesh, started.device, signals, began=began, save_seconds=lambda: saver.seconds if saver else 0.0
        ),
        progress=progress,
        start=run.state.iteration,
        again=prepared.again,
    )
    if prepared.scorer is not None:
        around.score, around.score_interval = prepared.scorer(run, around), prepared.score_interval
    if started.is_main:
        progress.began(started.place.job, announced_in(save), started.place.attempt)
    ended: Ended = "failed"
    try:
        status = train(run, around) if around.train is not None else Exit.FINISHED
        if status is Exit.FINISHED:
            status = prepared.finale(run, around)
        if status is Exit.FINISHED:
            finish(run, around)
        if status is Exit.FINISHED:
            around.stopping.obeyed()  # a request that came too late to be one
            say(out, *filter(None, [warning]))
        # Without a checkpoint training has nothing to go on from, so the stop is the end. An evaluation can be made again.
        status = status if around.saver is not None or around.train is None else Exit.FINISHED
        ended = "finished" if status is Exit.FINISHED else "preempted"
    except TrainingError:  # on all ranks: a save under way is what to go on from
        if around.saver is not None:
            with suppress(CheckpointError):
                around.saver.finish()
        raise
    finally:
        if around.train is not None:
            around.train.close()
        for sink in around.sinks:
            sink.close(ended)
    return status


def announced_in(save: str | None) -> int | None:
    """The iteration that --save announces as its latest; None where it says nothing that can be read."""
    with suppress(CheckpointError):
        return announced(Path(save)) if save is not None else None
    return None


def first_says(run: Run, answer: bool) -> bool:
    """The first rank's answer, on all ranks: each may see a file at another moment. Collective."""
    vote = torch.tensor(int(answer and run.job.is_main), device=run.job.device)
    return bool(all_reduce(vote, run.mesh.world, "max").item())


def announce(prepared: Prepared, started: Job, out: TextIO | None) -> None:
    """The first lines of a run: where its state comes from, what it runs on, how it is laid out."""
    config, source = prepared.config, prepared.source
    layout, vocab = config.layout, config.model.size("vocab_size")
    tp, pp = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size
    padded = padded_vocabulary(vocab, tp, config.model.make_vocab_size_divisible_by)
    say(
        out,
        *source.lines,
        *differences(source, config, another_order(source.state.order, prepared.datasets[0], config.data, config.batch.seed)),
        *prepared.notes,
        started.describe(),
        f"using world size: {started.place.world_size}, data-parallel-size: {started.place.world_size // (tp * pp)}, "
        f"tensor-model-parallel size: {tp}, pipeline-model-parallel size: {pp} ",
        f" > padded vocab (size: {vocab}) with {padded - vocab} dummy tokens (new size: {padded})",
        *stage_table(config, Grid.from_layout(layout, started.place.world_size), stages_of(config)),
        " > throughput and MFU: " + flops_in_words(MetaModel(config.model), config.data.seq_length or 0),
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
    """FLOPs of training on one sample, with all its choices where it has some."""
    seq_length = config.data.seq_length or 0
    return float(flops_per_token(MetaModel(config.model), seq_length) * seq_length * config.model.rows)


def causal_share(config: RunConfig) -> float | None:
    """The share of `sample_flops` that is left with the causal half of attention; None for BERT."""
    model, seq_length = MetaModel(config.model), config.data.seq_length or 0
    causal = causal_flops_per_token(model, seq_length)
    return None if causal is None else causal / flops_per_token(model, seq_length)
