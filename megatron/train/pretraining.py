"""Pretrain by a valid command: open tokenizer, checkpoint and datasets, then build the run, train and evaluate.

Errors in the inputs are found before the process group forms, and reported once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TextIO

from megatron.checkpoint.hugging_face_files import inherited_assets
from megatron.config.command_line.parse import Parsed
from megatron.config.schema import RunConfig
from megatron.data.build import build_datasets
from megatron.data.gpt import SampleSource
from megatron.data.loader import Collate, MicroBatchLoader
from megatron.data.matching import adopt_dataset_roles
from megatron.data.mock import MOCK_DATA_NOTE
from megatron.data.order import order_differs, order_marks
from megatron.data.recipe import build_recipe
from megatron.data.tokenizer import Tokenizer, build_tokenizer
from megatron.launch.environment import LaunchEnvironment
from megatron.launch.errors import InputError
from megatron.launch.job import Job
from megatron.launch.signals import StopSignals
from megatron.launch.watchdog import Watchdog
from megatron.mesh.grid import Grid
from megatron.parallel.embedding import padded_vocab_size
from megatron.plan.enough_memory import check_memory
from megatron.plan.size import MetaModel
from megatron.plan.stages import build_schedule, plan_stages
from megatron.plan.tables import describe_flops, stage_table
from megatron.train.continuation import (
    continues_run,
    first_rank_decides,
    is_trained,
    iteration_in_tracker,
    open_run_sinks,
    save_directory,
    set_other_run_aside,
)
from megatron.train.ending import Ending, Exit
from megatron.train.errors import TrainingError
from megatron.train.hooks.evaluate import Evaluate, HeldOut, final_evaluations
from megatron.train.hooks.first_step import NoteFirstStep
from megatron.train.hooks.installed import installed_hooks
from megatron.train.hooks.log import Log
from megatron.train.hooks.save import CheckSave, Save
from megatron.train.hooks.skips import LogSkips
from megatron.train.hooks.stop import AgreeOnStop, ExitInterval
from megatron.train.job_runner import as_input_error, print_lines, run_in_job
from megatron.train.loop import Hook, Training, train
from megatron.train.pipeline_profile import ProfiledStep
from megatron.train.progress import EarlyStop, Progress
from megatron.train.resume import check_source, difference_table, find_source, restore, verify_source
from megatron.train.resumed_schedule import check_batch_sizes, check_schedule, choose_schedule, zero_rate_warning
from megatron.train.run import Run, build_run, sample_counts
from megatron.train.save_directory import check_save
from megatron.train.saving import Saver
from megatron.train.sinks import Outcome
from megatron.train.skips import SkipCounter
from megatron.train.source import StateSource
from megatron.train.stopping import Stopping


@dataclass(frozen=True)
class Prepared:
    """Inputs of a run that each rank prepares by itself, before the process group forms.

    Attributes:
        config: the resolved configuration.
        notes: lines to print for the user at the start.
        tokenizer: the tokenizer of the datasets.
        source: the checkpoint that weights and counters are loaded from, or a fresh start.
        datasets: training, validation and test samples; None for a split that has none.
        collate: turns samples into a micro-batch.
        scorer: for a fine-tuning run, returns a function that computes and reports the task's score during training.
        score_interval: iterations between two scores.
        final: evaluates the finished model; None to compute the validation and test losses.
        hooks: hooks of other packages.
    """

    config: RunConfig
    notes: tuple[str, ...]
    tokenizer: Tokenizer
    source: StateSource
    datasets: tuple[SampleSource | None, SampleSource | None, SampleSource | None]
    collate: Collate
    scorer: Callable[[Run], Callable[[Training], object]] | None = None
    score_interval: int | None = None
    final: Callable[[Training], None] | None = None
    hooks: tuple[Hook, ...] = ()


def start(parsed: Parsed, env: LaunchEnvironment, began: float, signals: StopSignals, early_stop: EarlyStop) -> int:
    """Pretrain a model; see `run_prepared`.

    Args:
        parsed: the parsed command line.
        env: this process's launch environment.
        began: `time.monotonic()` at the start of the program.
        signals: the signals that ask the run to stop.
        early_stop: ends a run that is stopped before it can save.

    Returns:
        The exit status.
    """
    return run_prepared(prepare_pretraining, parsed, env, began, signals, early_stop)


def run_prepared(
    prepare: Callable[[Parsed, Watchdog], Prepared],
    parsed: Parsed,
    env: LaunchEnvironment,
    began: float,
    signals: StopSignals,
    early_stop: EarlyStop,
) -> int:
    """Prepare the inputs on each rank, then run the job.

    Args:
        prepare: opens the inputs of the run; may raise InputError.
        parsed: the parsed command line.
        env: this process's launch environment.
        began: `time.monotonic()` at the start of the program.
        signals: the signals that ask the run to stop.
        early_stop: ends a run that is stopped before it can save.

    Returns:
        The exit status.
    """

    def run(prepared: Prepared, joined: Job) -> int:
        signals.hold()  # from here on, requests to stop wait for the end of a step
        return run_job(prepared, joined, began, signals, early_stop)

    def prepare_and_check(watch: Watchdog) -> Prepared:
        prepared = prepare(parsed, watch)
        with as_input_error():
            build_schedule(prepared.config, Grid.from_layout(prepared.config.layout, env.world_size).dp)
        check_memory(prepared.config, env)
        hooks = installed_hooks()
        notes = (*prepared.notes, *(f"> hook of a package: {name}" for name in hooks))
        return replace(prepared, notes=notes, hooks=tuple(hooks.values()))

    config = parsed.config
    return run_in_job(
        prepare_and_check,
        run,
        config.layout,
        env,
        signals,
        early_stop,
        save=save_directory(config),
        compiled=config.batch.compile,
    )


def prepare_pretraining(parsed: Parsed, watch: Watchdog) -> Prepared:
    """Open the tokenizer, the checkpoint to start from and the datasets.

    Raises:
        InputError: one of them is missing or invalid.
    """
    with as_input_error():
        config = parsed.config
        watch.waiting("reading the tokenizer")  # phases of `waiting` have no time limit: opening a large dataset may take long
        tokenizer = build_tokenizer(config.tokenizer)
        settings, lines = adopt_dataset_roles(config.data, config.tokenizer, tokenizer)
        config = replace(config, tokenizer=settings, model=replace(config.model, vocab_size=tokenizer.vocab_size))
        watch.waiting("looking for a checkpoint")
        source = find_source(config.checkpoint)
        check_source(source, config)
        check_schedule(source, config)
        check_batch_sizes(source, config, parsed.world_size)
        notes = (*parsed.notes, *lines, *check_save(source, config))
        watch.waiting("building the datasets")
        recipe = build_recipe(config.model, config.data, config.batch.seed, tokenizer)
        datasets = build_datasets(config.data, config.batch.seed, sample_counts(config), tokenizer, recipe.make, recipe.mock)
        if config.data.mock_data:
            notes += (MOCK_DATA_NOTE,)
    if datasets[0] is None and not config.eval.skip_train:
        raise InputError(
            "there is nothing to train on: give --split a share for training, or --train-data-path; --skip-train only evaluates"
        )
    return Prepared(config, notes, tokenizer, source, datasets, recipe.collate)


def run_job(prepared: Prepared, joined: Job, began: float, signals: StopSignals, early_stop: EarlyStop) -> int:
    """Build the run, restore its state, train and evaluate. Collective.

    Args:
        prepared: this rank's inputs.
        joined: the job, whose ranks have joined.
        began: `time.monotonic()` at the start of the program.
        signals: the signals that ask the run to stop.
        early_stop: contains the record of the run's slices, and the advice on resuming.

    Returns:
        The exit status.
    """
    prepared = replace(prepared, source=verify_source(prepared.source, prepared.config, joined))
    config, source, progress = prepared.config, prepared.source, early_stop.progress
    out, save = sys.stdout if joined.is_main else None, save_directory(config)
    announce(prepared, joined, out)
    run = build_restored(prepared, joined, out)
    continues, trained = continues_run(source, config), is_trained(source, run)
    if trained and (not continues or first_rank_decides(run, progress.finished == run.state.iteration)):
        print_lines(out, f"iteration {run.state.iteration} is already the last one: nothing is left to train")
        return Exit.FINISHED
    # Only after all ranks have loaded the checkpoint, so that a run that fails before has moved no files.
    set_other_run_aside(run, source, out)
    warning = None if config.eval.skip_train else zero_rate_warning(run.schedule, run.state, config.batch)
    print_lines(out, warning)
    if config.log.profile_pipeline is not None:
        run.step = ProfiledStep(run, Path(config.log.profile_pipeline), partial(print_lines, out))
    evaluated = not (run.state.evaluation_due or trained)
    sinks = [] if out is None else open_run_sinks(run, source, out, continues=continues, evaluated=evaluated)
    assets = partial(inherited_assets, prepared.tokenizer, source.directory, partial(print_lines, out))
    saver = Saver(run, assets, partial(print_lines, out)) if save is not None else None
    open_training_data, held_out = data_openers(run, prepared)
    training = Training(
        run,
        None if open_training_data is None or config.eval.skip_train else open_training_data(),
        sinks,
        Stopping(config, run.mesh, joined.device, signals, began=began, save_seconds=lambda: saver.seconds if saver else 0.0),
        start=run.state.iteration,
    )
    skips = SkipCounter()
    hooks = build_hooks(prepared, run, saver, progress, skips, held_out)
    if joined.is_main:
        progress.note_start(joined.env.job, iteration_in_tracker(save), joined.env.attempt)
    ending = Ending(training, saver, progress, skips, resume_advice=early_stop.resume_advice, warning=warning)
    return train_and_evaluate(training, hooks, prepared.final or partial(final_evaluations, splits=held_out), ending)


def train_and_evaluate(training: Training, hooks: Sequence[Hook], final: Callable[[Training], None], ending: Ending) -> Exit:
    """Train, evaluate the finished model, and end the run or, on a request to stop, this slice of it. Collective.

    Args:
        training: the state of the training loop; its loader and sinks are closed in any case.
        hooks: called after every step, in this order.
        final: evaluates the finished model.
        ending: saves the last checkpoint, and records how the slice ended.
    """
    outcome: Outcome = "failed"
    try:
        if training.loader is not None:
            train(training, hooks)
        if training.request.stop is None:
            final(training)
        status = ending.finish() if training.request.stop is None else ending.stop(training.request)
        outcome = "finished" if status is Exit.FINISHED else "preempted"
    except TrainingError:  # raised on all ranks; a save in progress may become the checkpoint to resume from
        ending.finish_pending_save()
        raise
    finally:
        if training.loader is not None:
            training.loader.close()
        for sink in training.sinks:
            sink.close(outcome)
    return status


def build_hooks(
    prepared: Prepared, run: Run, saver: Saver | None, progress: Progress, skips: SkipCounter, held_out: Sequence[HeldOut]
) -> list[Hook]:
    """Return the hooks of a run, in the order in which they are called after every step.

    Args:
        prepared: contains the hooks of other packages, and the task's score.
        run: the run.
        saver: writes checkpoints; None without --save.
        progress: the record of the run's slices.
        skips: counts the steps without an update.
        held_out: the held-out samples, one entry for each split that has some.
    """
    validation = next((samples for samples in held_out if samples.split == "validation"), None)
    score = None if prepared.scorer is None else prepared.scorer(run)
    # The order matters: hooks of other packages set metrics of the log line; the error of a background save comes before the
    # next save; the agreement on a stop comes before an evaluation, which it cancels; the save comes last, with all requests.
    return [
        *prepared.hooks,
        LogSkips(skips),
        Log(run.config, run.job.device),
        *([] if saver is None else [CheckSave(saver)]),
        NoteFirstStep(progress),
        AgreeOnStop(evaluations_follow=bool(held_out)),
        Evaluate(validation, score, prepared.score_interval),
        ExitInterval(),
        *([] if saver is None else [Save(saver)]),
    ]


def build_restored(prepared: Prepared, joined: Job, out: TextIO | None) -> Run:
    """Build the run, and load its weights and counters from the source. Collective.

    Args:
        prepared: contains the configuration, and the source of the weights.
        joined: the job, whose ranks have joined.
        out: the console; None on all ranks but the first.
    """
    config, source = prepared.config, prepared.source
    joined.watch.waiting("building the model")
    run = build_run(config, joined, schedule=choose_schedule(source, config))
    joined.watch.waiting("loading the checkpoint")
    if new_parameters := restore(source, run):
        print_lines(out, f"not in the checkpoint, initialised from the seed: {', '.join(new_parameters)}")
    if prepared.datasets[0] is not None:
        run.state.order = order_marks(prepared.datasets[0], sample_counts(config)[0], config.data, config.batch.seed)
    print_lines(
        out, f"> parameters: {sum(p.numel() for b in run.optimizer.buffers for p in b.parameters)} on this rank, with padding"
    )
    return run


def announce(prepared: Prepared, joined: Job, out: TextIO | None) -> None:
    """Print the first lines of a run, about the source of its state, its devices and its layout.

    Args:
        prepared: contains the configuration, and the source of the state.
        joined: the job, whose ranks have joined.
        out: the console; None on all ranks but the first.
    """
    config, source = prepared.config, prepared.source
    layout, vocab = config.layout, config.model.known_vocab_size
    tp, pp = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size
    padded = padded_vocab_size(vocab, tp, config.model.make_vocab_size_divisible_by)
    other_order = order_differs(source.state.order, prepared.datasets[0], config.data, config.batch.seed)
    lines = [
        *source.lines,
        *difference_table(source, config, other_order),
        *prepared.notes,
        joined.describe(),
        f"using world size: {joined.env.world_size}, data-parallel-size: {joined.env.world_size // (tp * pp)}, "
        f"tensor-model-parallel size: {tp}, pipeline-model-parallel size: {pp} ",
        f" > padded vocab (size: {vocab}) with {padded - vocab} dummy tokens (new size: {padded})",
        *stage_table(config, Grid.from_layout(layout, joined.env.world_size), plan_stages(config)),
        " > throughput and MFU: " + describe_flops(MetaModel(config.model), config.data.seq_length),
    ]
    print_lines(out, *lines)


Opener = Callable[[], MicroBatchLoader]


def data_openers(run: Run, prepared: Prepared) -> tuple[Opener | None, list[HeldOut]]:
    """Return a function that opens the training data at the run's position, and the held-out samples of each split."""
    data, batch, dp = run.config.data, run.config.batch, run.mesh.dp

    def make_opener(dataset: SampleSource, name: str, consumed: int = 0, *, cyclic: bool = False) -> Opener:
        return lambda: MicroBatchLoader(
            dataset,
            prepared.collate,
            dp.rank,
            dp.size,
            batch.micro_batch_size,
            consumed,
            read_ahead=data.num_workers,
            cyclic=cyclic,
            seed=batch.seed,
            pin_memory=run.job.device.type == "cuda",
            name=name,
        )

    training, *others = prepared.datasets
    consumed, cyclic = run.state.consumed_samples, data.dataloader_type == "cyclic"
    held_out = zip(("validation", "test"), others, strict=True)
    return (
        None if training is None else make_opener(training, "training", consumed, cyclic=cyclic),
        [HeldOut(split, make_opener(dataset, split)) for split, dataset in held_out if dataset is not None],
    )
