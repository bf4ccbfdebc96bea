"""Settings of tasks/main.py: evaluation and fine-tuning, with the table of the tasks and of the models that they need."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from megatron.config.check import ConfigCheck, Rules
from megatron.config.errors import Problem
from megatron.config.option import NOT_NEGATIVE, POSITIVE, option
from megatron.config.paths import path_in_save
from megatron.files.prefixes import suggest_prefix
from megatron.files.regular import describe_file_kind

# These determine the samples and the length of a pretraining run. A task would ignore them, so they are mistakes there.
PRETRAINING_ONLY = (
    "data.data_path", "data.train_data_path", "data.valid_data_path", "data.test_data_path", "data.mock_data",
    "data.data_args_path", "data.per_split_data_args_path", "data.split",
    "data.dataloader_type", "batch.train_iters", "batch.train_samples", "batch.rampup_batch_size",
    "batch.step_batch_size_schedule", "batch.decrease_batch_size_if_needed", "data.mask_prob", "data.short_seq_prob",
)  # fmt: skip


@dataclass(frozen=True)
class TaskKind:
    """Model that a task needs.

    Attributes:
        architecture: gpt or bert.
        head: kind of head that is fine-tuned; None for a task that evaluates a model as it was pretrained.
        labels: names of the head's outputs, if the task fixes them, in Megatron-LM's order.
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


@dataclass(frozen=True)
class TaskConfig:
    """Evaluation and fine-tuning by tasks/main.py."""

    task: str | None = option(None, "task to evaluate or to fine-tune on", choices=tuple(TASKS))
    train_data: tuple[str, ...] = option((), "files to fine-tune on; for RACE, directories")
    valid_data: tuple[str, ...] = option((), "files to evaluate; for RACE, directories")
    epochs: int | None = option(None, "passes over --train-data; 0: evaluate only", legal=NOT_NEGATIVE)
    pretrained_checkpoint: str | None = option(
        None, "directory of pretrained checkpoints to fine-tune; --load names fine-tuned ones, to evaluate or to resume"
    )
    overlapping_eval: int = option(32, "WIKITEXT103, PERPLEXITY: stride of the overlapping windows, in tokens", legal=POSITIVE)
    strict_lambada: bool = option(False, "LAMBADA: tokenize the last word separately from its context")
    results_path: str | None = option(None, "JSON file for the results (default: results.json in --save)")


def settings_from_task(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that follow from a task: the model's architecture and head, and the checkpoint to load.

    Args:
        values: `section.field` -> value, as the user gave them.

    Returns:
        `section.field` -> value. Sizes are not among them: those of a task's model come from its checkpoint.
    """
    kind = TASKS.get(values.get("task.task", ""))
    if kind is None:
        return {"eval.skip_train": True}  # so that no rule asks for what only training needs
    load, pretrained = values.get("checkpoint.load"), values.get("task.pretrained_checkpoint")
    trains = kind.head is not None and bool(values.get("task.train_data")) and not values.get("eval.skip_train")
    trains = trains and values.get("task.epochs") != 0  # missing epochs are reported as a mistake of a run that trains
    follows: dict[str, Any] = {
        "model.architecture": kind.architecture,
        "model.task_head": kind.head,
        "model.labels": kind.labels,
        "eval.skip_train": not trains,
    }
    if load or pretrained:
        # Only --load in training continues a run, with its iteration and optimizer state; else the weights alone are loaded.
        weights_alone = load is None or not trains
        follows |= {
            "checkpoint.load": load or pretrained,
            "checkpoint.finetune": weights_alone or values.get("checkpoint.finetune", False),
            "checkpoint.use_checkpoint_args": True,
        }
    return follows


def derive_task(task: TaskConfig, save: str | None) -> TaskConfig:
    """Fill in the path of the results."""
    if task.task is None or task.results_path is not None:
        return task
    return replace(task, results_path=path_in_save(save, "results.json"))


def no_task(c: ConfigCheck) -> Iterator[Problem]:
    """Pretraining has none of the settings of tasks."""
    for name in c.options:
        if name == "task.epochs" and c.is_set(name):
            rule = "belongs to tasks/main.py; say how long with --train-iters, or with --train-samples"
            yield Problem(c.flag_text(name), f"{rule} (an epoch is as many as the data has)")
        elif name.startswith("task.") and c.is_set(name):
            yield Problem(c.flag_text(name), "belongs to tasks/main.py; leave it out")


def task_named(c: ConfigCheck) -> Iterator[Problem]:
    """A task is named."""
    if c["task.task"] is None and "task.task" not in c.invalid:
        yield Problem("`--task`", "is missing, and has no default", ", ".join(TASKS))


def model_named(c: ConfigCheck) -> Iterator[Problem]:
    """A task has a checkpoint to start from, by one of two flags."""
    if c["task.task"] is None:  # reported by `task_named`; what --load means follows from it
        return
    if c["checkpoint.load"] is None and not c.invalid & {"checkpoint.load", "task.pretrained_checkpoint"}:
        yield Problem(
            "`--load`", "is missing: the checkpoint to evaluate; `--pretrained-checkpoint` begins fine-tuning from one"
        )
    if c["task.pretrained_checkpoint"] is not None and c["checkpoint.load"] != c["task.pretrained_checkpoint"]:
        both = c.flag_text("task.pretrained_checkpoint", "checkpoint.load")
        rule = "exclude each other: the first begins fine-tuning, the second goes on with it or evaluates what it gave"
        yield Problem(both, f"{rule}; with --auto-resume a run that was interrupted goes on from its --save")


def task_data(c: ConfigCheck) -> Iterator[Problem]:
    """A task has data to evaluate or to train on; one that trains nothing has no settings of training."""
    kind = TASKS.get(c["task.task"] or "")
    if kind is None:
        return
    train, valid = c["task.train_data"], c["task.valid_data"]
    if kind.head is None:
        for name in ("task.train_data", "task.epochs", "task.pretrained_checkpoint"):
            if c.is_set(name):
                yield Problem(c.flag_text(name), f"does not go with --task {c['task.task']}, which trains nothing")
    elif train and c["task.epochs"] is None and "task.epochs" not in c.invalid:
        yield Problem(c.flag_text("task.train_data"), "needs `--epochs`, the number of passes over it")
    elif c["task.epochs"] and not train:
        yield Problem(c.flag_text("task.epochs"), "needs `--train-data`")
    if not valid and (kind.head is None or c["eval.skip_train"]):
        yield Problem("`--valid-data`", "is missing: the files to evaluate")


def pretraining_settings(c: ConfigCheck) -> Iterator[Problem]:
    """A task has none of the settings of pretraining, which would silently do nothing."""
    for name in PRETRAINING_ONLY:
        if c.is_set(name):
            instead = "--train-data, --valid-data and --epochs say what is read, and how long"
            yield Problem(c.flag_text(name), f"belongs to pretraining; leave it out: {instead}")


def whole_sequences(c: ConfigCheck) -> Iterator[Problem]:
    """A task does without context parallelism: its samples are short, and ranks serve data parallelism better."""
    if c["layout.context_parallel_size"] != 1:
        yield Problem(
            c.flag_text("layout.context_parallel_size"),
            "is for pretraining; a task takes these ranks for data parallelism",
            "1",
        )


def windows(c: ConfigCheck) -> Iterator[Problem]:
    """Windows overlap or adjoin, so that no token is left out."""
    step, seq = c["task.overlapping_eval"], c["data.seq_length"]
    if seq and c["task.task"] in ("WIKITEXT103", "PERPLEXITY") and step > seq:
        yield Problem(
            c.flag_text("task.overlapping_eval"), f"is more than `--seq-length {seq}`: tokens would be left out", f"1 to {seq}"
        )


def task_files(c: ConfigCheck) -> Iterator[Problem]:
    """The data of a task can be read."""
    for name in ("task.train_data", "task.valid_data"):
        for word in c[name]:
            path = Path(word)
            # PERPLEXITY also takes indexed datasets, by their prefix, under which itself there is no file.
            dataset = c["task.task"] == "PERPLEXITY" and os.path.exists(f"{word}.idx")
            if not os.path.exists(path) and not dataset:
                meant = suggest_prefix(word, "document") if c["task.task"] == "PERPLEXITY" else None
                yield Problem(c.options[name].text((word,)), "does not exist" + (f"; {meant}" if meant else ""))
            elif os.path.exists(path) and os.path.isdir(path) != (c["task.task"] == "RACE"):
                kind = "directories" if c["task.task"] == "RACE" else "files"
                yield Problem(
                    c.options[name].text((word,)),
                    f"is a {'directory' if os.path.isdir(path) else 'file'}; {c['task.task']} comes in {kind}",
                )
            elif os.path.exists(path) and not os.path.isdir(path) and (kind := describe_file_kind(path.stat().st_mode)):
                yield Problem(c.options[name].text((word,)), f"is {kind}, not a regular file")
            elif os.path.exists(path) and not os.access(path, os.R_OK):
                yield Problem(c.options[name].text((word,)), "cannot be read: permission denied")


RULES = Rules(
    pretraining=(no_task,),
    tasks=(task_named, model_named, task_data, pretraining_settings, whole_sequences, windows),
    disk=(task_files,),
)
