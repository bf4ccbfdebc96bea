"""Settings of evaluation during training."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.config.check import Rules
from megatron.config.option import NOT_NEGATIVE, option


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation during and after training."""

    eval_iters: int = option(100, "global batches per evaluation", legal=NOT_NEGATIVE)
    eval_interval: int = option(1000, "iterations between evaluations; 0: evaluate only after training", legal=NOT_NEGATIVE)
    skip_train: bool = option(
        False, "evaluate without training; --save then receives metrics only, and may be the directory of a run in progress"
    )


RULES = Rules()
