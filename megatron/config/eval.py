"""Settings of evaluation during training."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.config.check import Rules
from megatron.config.option import NOT_NEGATIVE, option


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation during training."""

    eval_iters: int = option(100, "steps of one evaluation", legal=NOT_NEGATIVE)
    eval_interval: int = option(
        1000, "training steps between evaluations; 0: none before training has ended", legal=NOT_NEGATIVE
    )
    skip_train: bool = option(False, "only evaluate; --save then takes metrics alone, also beside the run that saves there")


RULES = Rules()
