"""Counters of a run, which determine the data position, the learning rate and all random numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from megatron.optim.scaler import ConstantScaler, Scaler
from megatron.parallel.spec import Shard


@dataclass
class TrainState:
    """Counters of a run, which checkpoints save. All are equal on all ranks, except for wandb_run.

    Attributes:
        iteration: number of iterations done.
        consumed_samples: number of training samples read, those of skipped steps included; this is the data position.
        consumed_tokens: number of tokens in these samples.
        skipped_samples: number of consumed samples in the iterations that --skip-train-iterations names.
        scheduled_samples: number of samples in the steps with an update; it determines the learning rate.
        consecutive_skips: number of skipped steps since the last update, without those of --skip-train-iterations.
        scaler: the loss scale; its current value and counters are saved, not its settings.
        schedule: the fields of the learning-rate schedule in use, which a resumed run keeps.
        training_samples: number of samples that the training set was built for.
        order: digests of the order of samples, by which a resumed run detects a change of the order; see `data/order.py`.
        evaluation_due: the evaluation after this iteration has not been completed; a resumed run makes it first.
        wandb_run: the id of the W&B run, or ""; only that of the first rank is used.
        window_loss: sum of the losses since the last log line. The window_ fields are saved so that a resumed run prints the
            same lines as an uninterrupted one.
        window_sop: sum of the sentence-order losses since the last log line.
        window_steps: number of steps in these sums.
        window_skipped: number of skipped steps since the last log line.
        window_nan: number of steps since the last log line whose loss was NaN.
    """

    iteration: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0
    skipped_samples: int = 0
    scheduled_samples: int = 0
    consecutive_skips: int = 0
    scaler: Scaler = field(default_factory=ConstantScaler)
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
        """Reset the sums for the averages of the next log line."""
        self.window_loss = self.window_sop = 0.0
        self.window_steps = self.window_skipped = self.window_nan = 0

    # The methods of `parallel.spec.Checkpointable`, for a part of a checkpoint without tensors.

    def shards(self) -> Iterator[Shard]:
        return iter(())

    def scalars(self) -> dict[str, Any]:
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return values | {"scaler": self.scaler.scalars()}

    def load_scalars(self, values: Mapping[str, Any]) -> None:
        # Fields that an older checkpoint lacks keep their defaults. Only the scaler's value and counters are loaded.
        for each in fields(self):
            if each.name in values and each.name != "scaler":
                setattr(self, each.name, values[each.name])
        self.scaler.load_scalars(values.get("scaler", {}))
