"""Report to Weights & Biases through a separate process, so that the run does not wait for the network."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from megatron.config.command_line.saved import to_json
from megatron.config.schema import LogConfig
from megatron.train.report import Evaluation, LogContext, Metrics
from megatron.train.run import Run
from megatron.train.sinks import Outcome, Sink, evaluation_points, learning_points, speed_points
from megatron.train.wandb_link import WandbLink
from megatron.train.wandb_run import WANDB_FILE, WandbRun, choose_wandb_run, read_wandb_run, settings_digest


class Wandb(Sink):
    """Sends the tags of TensorBoard to a run of Weights & Biases, each iteration once; see `wandb_run.py`.

    Args:
        config: contains the project, names and intervals.
        run: the W&B run.
        record: the file that records the newest points in W&B; None without --save.
        settings: the configuration that W&B shows for the run.
        out: the console.
    """

    def __init__(self, config: LogConfig, run: WandbRun, record: Path | None, settings: Mapping[str, Any], out: TextIO) -> None:
        self.config = config
        shown = dict(settings) | ({"forked_from": {"run": run.parent, "iteration": run.fork}} if run.parent else {})
        init: dict[str, Any] = {"project": config.wandb_project, "name": config.wandb_exp_name, "id": run.id}
        init["entity"] = config.wandb_entity
        init |= {"dir": os.path.abspath(config.wandb_save_dir or "."), "config": shown}
        setup = {"init": init, "run": asdict(run), "record": None if record is None else os.path.abspath(record)}
        self._link = WandbLink(setup, lambda text: print(text, file=out, flush=True))

    def step(self, metrics: Metrics, context: LogContext) -> None:
        if metrics.iteration % self.config.tensorboard_log_interval:
            return
        values = learning_points(self.config, metrics, context) | speed_points(self.config, metrics)
        values["samples vs steps"] = metrics.consumed_samples
        self._send(metrics.iteration, None, values)

    def evaluation(self, result: Evaluation, title: str) -> None:
        self._send(result.iteration, result.split, evaluation_points(self.config, result))

    def _send(self, step: int, split: str | None, values: Mapping[str, float]) -> None:
        # JSON has neither NaN nor infinity; they are sent as text.
        sent = {tag: value if math.isfinite(value) else str(value) for tag, value in values.items()}
        self._link.send({"step": step, "split": split, "values": sent})

    def close(self, outcome: Outcome) -> None:
        self._link.end(outcome)


def wandb_sink(run: Run, save: str | None, continues: bool, resumed: bool) -> Callable[[], Wandb] | None:
    """Choose the W&B run, store its id in the run's state, and return a function that opens its sink on the first rank.

    Args:
        run: the run; its `state.wandb_run` is set.
        save: the directory of --save; None without it.
        continues: this process continues the run saved in --save.
        resumed: the run starts from a checkpoint.

    Returns:
        A function that opens the sink; None without --wandb-project.
    """
    config, state = run.config, run.state
    if not continues:
        state.wandb_run = ""  # the id in a checkpoint from elsewhere is that of another run
    if config.log.wandb_project is None:
        return None
    record = None if save is None else Path(save) / WANDB_FILE
    previous = read_wandb_run(record) if continues else WandbRun()
    settings = settings_digest(config, state.schedule)
    saved_id = state.wandb_run if resumed else previous.id
    chosen = choose_wandb_run(saved_id, state.iteration, previous, settings)
    state.wandb_run = chosen.id
    shown = to_json(config) | {"world_size": run.job.env.world_size}
    return partial(Wandb, config.log, chosen, record, shown, sys.stdout)
