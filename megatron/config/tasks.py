"""The tasks of tasks/main.py: which model each one is for, and which head that model needs. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True)
class TaskKind:
    """architecture: of the model. head: that is fine-tuned; None for a task that asks a model as it was pretrained.

    labels: of the head, where the task fixes them; in Megatron-LM's order, which is that of the outputs.
    """

    architecture: str
    head: str | None = None
    labels: tuple[str, ...] = ()


TASKS: Mapping[str, TaskKind] = MappingProxyType(
    {
        "WIKITEXT103": TaskKind("gpt"),
        "LAMBADA": TaskKind("gpt"),
        "PERPLEXITY": TaskKind("gpt"),
        "RACE": TaskKind("bert", "choice", ("A", "B", "C", "D")),
        "MNLI": TaskKind("bert", "classification", ("contradiction", "entailment", "neutral")),
        "QQP": TaskKind("bert", "classification", ("0", "1")),
        "SQUAD": TaskKind("bert", "span"),
        "NER": TaskKind("bert", "tags"),
    }
)


def implied(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run that follow from a task's, `section.field` -> value: what is built, and from which checkpoint.

    values: as the user gave them. Without a known task nothing is built. The model's sizes always come from its checkpoint.
    """
    kind = TASKS.get(values.get("task.task", ""))
    if kind is None:
        return {"eval.skip_train": True}
    load, pretrained = values.get("checkpoint.load"), values.get("task.pretrained_checkpoint")
    trains = kind.head is not None and bool(values.get("task.train_data")) and not values.get("eval.skip_train")
    trains = trains and values.get("task.epochs") != 0  # ones that are missing are a mistake of a run that trains
    follows: dict[str, Any] = {
        "model.architecture": kind.architecture,
        "model.task_head": kind.head,
        "model.labels": kind.labels,
        "eval.skip_train": not trains,
    }
    if load or pretrained:
        weights_alone = load is None or not trains
        follows |= {
            "checkpoint.load": load or pretrained,
            "checkpoint.finetune": weights_alone or values.get("checkpoint.finetune", False),
            "checkpoint.use_checkpoint_args": True,
        }
    return follows
