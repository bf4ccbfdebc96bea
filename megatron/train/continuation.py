"""Decide whether a run continues the run saved in --save; open its files or move them aside accordingly."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TextIO

import torch

from megatron.checkpoint.agreement import run_on_all_ranks
from megatron.checkpoint.layout import CheckpointError, latest_iteration
from megatron.config.schema import RunConfig
from megatron.parallel.collectives import all_reduce
from megatron.train.job_runner import print_lines
from megatron.train.run import Run
from megatron.train.save_directory import set_metrics_aside, set_run_aside, starts_beside_another_run
from megatron.train.sinks import Sink, open_sinks
from megatron.train.source import StateSource
from megatron.train.wandb_sink import wandb_sink


def save_directory(config: RunConfig) -> str | None:
    """Return --save; None with --skip-train, which writes no checkpoints."""
    return None if config.eval.skip_train else config.checkpoint.save


def continues_run(source: StateSource, config: RunConfig) -> bool:
    """Return whether this process continues the run saved in --save, rather than starting a new one.

    A continued run removes the metrics that were written after its checkpoint, since it will write them again.
    """
    save = save_directory(config)
    if save is None:
        return False
    if source.directory is None:  # the run in --save may have been killed before its first checkpoint
        return config.checkpoint.auto_resume or config.checkpoint.load is not None
    # Resolved, since --load and --save may name the same directory by different paths.
    return source.progress and source.directory.resolve().parent == Path(save).resolve()


def is_trained(source: StateSource, run: Run) -> bool:
    """Return whether the checkpoint is one of the last iteration, so that nothing is left to train."""
    total = run.config.batch.iterations
    return source.progress and not run.config.eval.skip_train and run.state.iteration >= total


def first_rank_decides(run: Run, answer: bool) -> bool:
    """Return the first rank's answer on all ranks, since the ranks may have read a file at different times. Collective."""
    vote = torch.tensor(int(answer and run.job.is_main), device=run.job.device)  # scalar, 0 on all ranks but the first
    return bool(all_reduce(vote, run.mesh.world, "max").item())


def set_other_run_aside(run: Run, source: StateSource, out: TextIO | None) -> None:
    """If --save contains the files of another run, move them aside before this run saves there. Collective.

    Args:
        run: the run that is about to start.
        source: the checkpoint that the run starts from.
        out: the console; None on all ranks but the first.
    """
    config, save = run.config, save_directory(run.config)
    if config.checkpoint.overwrite and out is not None and config.log.metrics_path is not None:
        print_lines(out, set_metrics_aside(Path(config.log.metrics_path), config.checkpoint.save))
    if save is not None and starts_beside_another_run(source, config):
        # The first rank moves the files; `run_on_all_ranks` raises its error on all ranks.
        move = partial(set_run_aside, Path(save), config.log.metrics_path)
        print_lines(out, run_on_all_ranks(run.mesh.world, lambda: move() if run.job.is_main else None))


def open_run_sinks(run: Run, source: StateSource, out: TextIO, *, continues: bool, evaluated: bool) -> list[Sink]:
    """Open the sinks of a run, on the first rank.

    Args:
        run: the run, with its state restored.
        source: the checkpoint that the state comes from.
        out: the console.
        continues: whether this process continues the run saved in --save.
        evaluated: whether the evaluations due at the restored iteration have been made.
    """
    return open_sinks(
        run.config.log,
        out,
        resume_at=run.state.iteration if continues else None,
        evaluated=evaluated,
        binary=run.config.model.has_binary_head,
        wandb=wandb_sink(run, save_directory(run.config), continues, source.directory is not None),
    )


def iteration_in_tracker(save: str | None) -> int | None:
    """Return the iteration in the tracker file of --save; None if that file is missing or unreadable."""
    with suppress(CheckpointError):
        return latest_iteration(Path(save)) if save is not None else None
    return None
