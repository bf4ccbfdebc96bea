"""Decide whether a run continues the one in --save; open or move the files there accordingly."""

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
    """Return whether this process continues the run of --save, rather than starting another one beside it.

    A run that continues drops the metrics that were written after its checkpoint, since it will write them again.
    """
    save = save_directory(config)
    if save is None:
        return False
    if source.directory is None:  # the run was killed before its first checkpoint
        return config.checkpoint.auto_resume or config.checkpoint.load is not None
    # Resolved, since --load and --save may name the same directory by different paths.
    return source.progress and source.directory.resolve().parent == Path(save).resolve()


def is_trained(source: StateSource, run: Run) -> bool:
    """Return whether the checkpoint already holds the last iteration of the run."""
    total = run.config.batch.iterations
    return source.progress and not run.config.eval.skip_train and run.state.iteration >= total


def first_rank_decides(run: Run, answer: bool) -> bool:
    """Return the first rank's answer on all ranks, since each may see a file at another moment. Collective."""
    vote = torch.tensor(int(answer and run.job.is_main), device=run.job.device)  # scalar; 0 on all other ranks
    return bool(all_reduce(vote, run.mesh.world, "max").item())


def set_other_run_aside(run: Run, source: StateSource, out: TextIO | None) -> None:
    """Move the files of another run in --save aside when this run starts a new one there. Collective.

    Args:
        run: the run.
        source: the checkpoint that it starts from.
        out: the console; None on all ranks but the first.
    """
    config, save = run.config, save_directory(run.config)
    if config.checkpoint.overwrite and out is not None and config.log.metrics_path is not None:
        print_lines(out, *filter(None, [set_metrics_aside(Path(config.log.metrics_path), config.checkpoint.save)]))
    if save is not None and starts_beside_another_run(source, config):
        # The first rank moves the files; `together` raises its error on all ranks.
        aside = partial(set_run_aside, Path(save), config.log.metrics_path)
        print_lines(out, *filter(None, [run_on_all_ranks(run.mesh.world, lambda: aside() if run.job.is_main else None)]))


def run_sinks(run: Run, source: StateSource, out: TextIO, *, continues: bool, evaluated: bool) -> list[Sink]:
    """Open the sinks of a run, on the first rank.

    Args:
        run: the run, with its state restored.
        source: the checkpoint that the state comes from.
        out: the console.
        continues: whether this process continues the run of --save.
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


def latest_announced(save: str | None) -> int | None:
    """Return the iteration in the tracker file of --save; None when there is none, or it cannot be read."""
    with suppress(CheckpointError):
        return latest_iteration(Path(save)) if save is not None else None
    return None
