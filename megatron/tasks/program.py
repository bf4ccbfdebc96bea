"""Run a parsed command of tasks/main.py: fine-tune a model, score a fine-tuned one, or score a pretrained one zero-shot."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial

from megatron.checkpoint.model_config import read_model_config
from megatron.config.command_line.parse import Parsed
from megatron.config.errors import ConfigError, Problem
from megatron.config.schema import RunConfig
from megatron.config.task import TASKS
from megatron.inference.restore import open_pipeline
from megatron.launch.environment import LaunchEnvironment
from megatron.launch.errors import InputError
from megatron.launch.job import Job
from megatron.launch.signals import StopSignals
from megatron.launch.watchdog import Watchdog
from megatron.mesh.grid import Grid
from megatron.mesh.mesh import Mesh
from megatron.optim.precision import Precision
from megatron.tasks.finetune import prepare_finetuning, write_results
from megatron.tasks.zeroshot import open_sources, zero_shot
from megatron.train.job_runner import as_input_error, print_lines, run_in_job
from megatron.train.pretraining import run_prepared
from megatron.train.progress import EarlyStop
from megatron.train.resume import check_source, find_source
from megatron.train.source import StateSource


def preview(parsed: Parsed) -> tuple[RunConfig, list[str]]:
    """Return the configuration that a command would use, and lines about its files, for a dry run.

    Raises:
        ConfigError: a file cannot be used.
    """
    config = parsed.config
    try:
        if TASKS[config.task.task or ""].head is not None:
            prepared = prepare_finetuning(parsed, Watchdog())
            return prepared.config, [*prepared.source.lines, *prepared.notes[len(parsed.notes) :]]
        source = check_inputs(config)
        with as_input_error():
            model = config.model if source.directory is None else read_model_config(source.directory)
    except InputError as error:
        raise ConfigError([Problem("a file of the command", f"cannot be used: {error}")]) from error
    return replace(config, model=model), list(source.lines)


def start_task(parsed: Parsed, env: LaunchEnvironment, began: float, signals: StopSignals, early_stop: EarlyStop) -> int:
    """Run a task, and return the exit status.

    Args:
        parsed: the parsed command line.
        env: the launch environment of this process.
        began: start of the program, `time.monotonic()`.
        signals: the signals that ask the job to stop.
        early_stop: returns message and exit status of a job that is stopped before it can save.
    """
    if TASKS[parsed.config.task.task or ""].head is not None:
        return run_prepared(prepare_finetuning, parsed, env, began, signals, early_stop)

    early_stop.before = "the end of the evaluation"

    def prepare(watch: Watchdog) -> RunConfig:
        watch.waiting("reading the files")  # a `waiting` phase has no time limit
        check_inputs(parsed.config)
        return parsed.config

    return run_in_job(prepare, evaluate_pretrained, parsed.config.layout, env, signals, early_stop)


def check_inputs(config: RunConfig) -> StateSource:
    """Check the files and the checkpoint of the task, and return the checkpoint. InputError if one cannot be used."""
    with as_input_error():
        # Opened only to find errors in them; `zero_shot` opens the files again.
        open_sources(config.task.task or "", config.task.valid_data)
        source = find_source(config.checkpoint)
        check_source(source, config)
    return source


def evaluate_pretrained(config: RunConfig, job: Job) -> int:
    """Score a pretrained model, and return the exit status. Collective."""
    task, stream = config.task, sys.stdout if job.is_main else None
    with as_input_error():
        source = find_source(config.checkpoint)
        print_lines(stream, *source.lines, job.describe())
        grid = Grid.from_layout(config.layout, job.env.world_size)
        shares = config.layout.shared_memory
        mesh = Mesh.build(grid, job.env.rank, job.timeout, watch=job.watch, shared_memory=shares)
        job.watch.waiting("loading the checkpoint")
        # Without a 16-bit precision in the command, the model has the dtype of the checkpoint.
        dtype = Precision.from_config(config.precision).compute if config.precision.is_16bit else None
        opened = open_pipeline(source.directory or "", mesh, device=job.device, dtype=dtype)
        results = zero_shot(
            task.task or "",
            opened,
            mesh,
            task.valid_data,
            seq_length=config.data.seq_length,
            overlap=task.overlapping_eval,
            strict=task.strict_lambada,
            micro_batch_size=config.batch.micro_batch_size,
            watch=job.watch,
            log=partial(print_lines, stream),
        )
    if task.results_path is not None and job.is_main:
        write_results(task.results_path, results)
        print_lines(stream, f"results: {task.results_path}")
    return 0
