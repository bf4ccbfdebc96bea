"""Position of a run: a handful of counters, from which the data position, the schedule and all random numbers follow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from megatron.optim.scaler import Constant, Scaler
from megatron.parallel.spec import Shard


@dataclass
class TrainState:
    """Counters of a run that every checkpoint saves; equal on all ranks, but for wandb_run.

    Attributes:
        iteration: iterations done.
        consumed_samples: training samples taken, those of skipped steps included; the data position.
        consumed_tokens: their tokens.
        skipped_samples: those of iterations that --skip-train-iterations left out, among the consumed ones.
        scheduled_samples: samples of the updates made; the learning rate follows them, so a skipped step is not counted.
        consecutive_skips: skipped steps since the last update.
        scaler: the loss scale; its position is saved, not its settings.
        schedule: the fields of the learning-rate schedule in use, which a resumed run keeps.
        training_samples: number of samples that the training set was built for.
        order: marks of the order of samples, by which a resumed run knows it again; see `data/order.py`.
        evaluation_due: the evaluation after this iteration was given up for a stop; a resumed run makes it first.
        wandb_run: the id of the run's W&B run, "" for none; the first rank's.
        window_loss: sum of the losses since the last log line. The window is saved so that a resumed run prints the lines
            of an uninterrupted one.
        window_sop: sum of the sentence-order losses since then.
        window_steps: steps in these sums.
        window_skipped: skipped steps since then.
        window_nan: steps since then whose loss was not a number.
    """

    iteration: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0
    skipped_samples: int = 0
    scheduled_samples: int = 0
    consecutive_skips: int = 0
    scaler: Scaler = field(default_factory=Constant)
    schedule: dict[str, Any] = field(default_factory=dict)
    training_samples: int = 0
    order: dict[str, str] = field(default_factory=dict)
    evaluation_due: bool = False
    wandb_run: str = ""
    window_loss: float = 0.0
    window_sop: float = 0.0
    window_steps: int = 0
    window_skipped: int = 0
    window_nan: int = 0

    def start_window(self) -> None:
        """Begin the averages of the next log line."""
        self.window_loss = self.window_sop = 0.0
        self.window_steps = self.window_skipped = self.window_nan = 0

    # A part of a checkpoint (parallel/spec.py: Checkpointable) that has no tensors.

    def shards(self) -> Iterator[Shard]:
        return iter(())

    def scalars(self) -> dict[str, Any]:
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return values | {"scaler": self.scaler.scalars()}

    def load_scalars(self, values: Mapping[str, Any]) -> None:
        # Fields that an older checkpoint does not have keep their defaults; the scaler keeps its settings.
        for each in fields(self):
            if each.name in values and each.name != "scaler":
                setattr(self, each.name, values[each.name])
        self.scaler.load_scalars(values.get("scaler", {}))
