"""A periodic action, a metric on the log line and a place for metrics, as another package would bring them."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from megatron.parallel.collectives import all_reduce
from megatron.train.loop import Hook, Training, is_due
from megatron.train.report import Evaluation, LogContext, Metrics, StepReport
from megatron.train.sinks import Outcome, Sink

EVERY = 3  # iterations
NAME = "embedding norm"


class Tally(Sink):
    """A sink that writes what it was told at the end, as JSON."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.told: dict[str, list[object]] = {"lines": [], "evaluations": []}

    def line(self, metrics: Metrics, context: LogContext) -> None:
        self.told["lines"].append([metrics.iteration, metrics.lm_loss, metrics.extra[NAME]])

    def evaluation(self, result: Evaluation, title: str) -> None:
        self.told["evaluations"].append([result.iteration, result.split])

    def close(self, outcome: Outcome) -> None:
        self.path.write_text(json.dumps(self.told | {"ended": outcome}))


class EmbeddingNorm(Hook):
    """Log the norm of the embedding after every step; every few steps write it to a file."""

    def before_training(self, training: Training) -> None:
        self.folder = Path(training.run.config.checkpoint.save or ".")
        if training.run.job.is_main:
            training.sinks.append(Tally(self.folder / "tally.json"))

    def after_step(self, training: Training, report: StepReport) -> None:
        run = training.run
        with training.timer.paused(), torch.no_grad():
            squares = run.stages[0].embedding.word.weight.square().sum()
            norm = training.extra_metrics[NAME] = all_reduce(squares, run.mesh.tp).sqrt().item()
            if is_due(training.iteration, EVERY):
                with (self.folder / f"norms.{run.job.env.rank}").open("a") as out:
                    out.write(f"{training.iteration} {norm!r}\n")

    def after_training(self, training: Training) -> None:
        training.log(f"the last {NAME} is {training.extra_metrics[NAME]:g}")
