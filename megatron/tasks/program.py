"""A legal command of tasks/main.py, carried out: a task that fine-tunes or judges a fine-tuned model, or one that asks a
pretrained model."""

from __future__ import annotations

from megatron.config.cli import Parsed
from megatron.mesh.place import Place
from megatron.mesh.signals import StopSignals
from megatron.tasks.finetune import prepare
from megatron.train.pretraining import run_prepared
from megatron.train.progress import EarlyStop


def start(parsed: Parsed, place: Place, began: float, signals: StopSignals, early: EarlyStop) -> int:
    """The exit status of the contract; arguments as for `train.pretraining.run_prepared`."""
    return run_prepared(prepare, parsed, place, began, signals, early)
