"""Settings of tasks/main.py, for evaluation and fine-tuning, and the table of the tasks with the models that they need."""

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

# Settings of the samples and the length of a pretraining run. A task would ignore them, so giving them is a mistake.
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
        head: kind of the task head, which is fine-tuned; None for a task that evaluates a pretrained model.
        labels: names of the head's outputs in Megatron-LM's order; empty if the data determine them.
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
        `section.field` -> value. The sizes of the model are not included, because they come from its checkpoint.
    """
    kind = TASKS.get(values.get("task.task", ""))
    if kind is None:
        return {"eval.skip_train": True}  # without a known task, no rule should ask for settings of training
    load, pretrained = values.get("checkpoint.load"), values.get("task.pretrained_checkpoint")
    trains = kind.head is not None and bool(values.get("task.train_data")) and not values.get("eval.skip_train")
    trains = trains and values.get("task.epochs") != 0  # without --epochs it counts as training, and `task_data` reports it
    derived: dict[str, Any] = {
        "model.architecture": kind.architecture,
        "model.task_head": kind.head,
        "model.labels": kind.labels,
        "eval.skip_train": not trains,
    }
    if load or pretrained:
        # Iteration and optimizer state are loaded only if fine-tuning resumes from --load; else only the weights are.
        weights_only = load is None or not trains
        derived |= {
            "checkpoint.load": load or pretrained,
            "checkpoint.finetune": weights_only or values.get("checkpoint.finetune", False),
            "checkpoint.use_checkpoint_args": True,
        }
    return derived


def derive_task(task: TaskConfig, save: str | None) -> TaskConfig:
    """Fill in the path of the results of a task, by default in --save."""
    if task.task is None or task.results_path is not None:
        return task
    return replace(task, results_path=path_in_save(save, "results.json"))


def no_task(c: ConfigCheck) -> Iterator[Problem]:
    """Pretraining is given no settings of tasks."""
    for name in c.options:
        if name == "task.epochs" and c.is_set(name):
            rule = "belongs to tasks/main.py; set the length of training with --train-iters, or with --train-samples"
            yield Problem(c.flag_text(name), f"{rule} (one epoch: all samples)")
        elif name.startswith("task.") and c.is_set(name):
            yield Problem(c.flag_text(name), "belongs to tasks/main.py; leave it out")


def task_named(c: ConfigCheck) -> Iterator[Problem]:
    """A task is named."""
    if c["task.task"] is None and "task.task" not in c.invalid:
        yield Problem("`--task`", "is missing, and has no default", ", ".join(TASKS))


def model_named(c: ConfigCheck) -> Iterator[Problem]:
    """A task is given a checkpoint to start from, by --load or by --pretrained-checkpoint."""
    if c["task.task"] is None:  # reported by `task_named`; the meaning of --load depends on the task
        return
    if c["checkpoint.load"] is None and not c.invalid & {"checkpoint.load", "task.pretrained_checkpoint"}:
        yield Problem(
            "`--load`", "is missing: the checkpoint to evaluate; `--pretrained-checkpoint` begins fine-tuning from one"
        )
    if c["task.pretrained_checkpoint"] is not None and c["checkpoint.load"] != c["task.pretrained_checkpoint"]:
        both = c.flag_text("task.pretrained_checkpoint", "checkpoint.load")
        rule = "exclude each other: the first begins fine-tuning, the second resumes it or evaluates its result"
        yield Problem(both, f"{rule}; with --auto-resume an interrupted run resumes from its --save")


def task_data(c: ConfigCheck) -> Iterator[Problem]:
    """A task is given data to evaluate or to train on; a task that only evaluates is given no settings of training."""
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
    """A task is given no settings of pretraining, which would have no effect."""
    for name in PRETRAINING_ONLY:
        if c.is_set(name):
            instead = "--train-data, --valid-data and --epochs set the data and the length of a task"
            yield Problem(c.flag_text(name), f"belongs to pretraining; leave it out: {instead}")


def whole_sequences(c: ConfigCheck) -> Iterator[Problem]:
    """A task does not use context parallelism: its samples are short, so data parallelism makes better use of the ranks."""
    if c["layout.context_parallel_size"] != 1:
        yield Problem(
            c.flag_text("layout.context_parallel_size"),
            "is for pretraining; a task uses these ranks for data parallelism",
            "1",
        )


def windows(c: ConfigCheck) -> Iterator[Problem]:
    """Windows overlap or adjoin: the stride is at most the sequence length, so that no token is left out."""
    step, seq = c["task.overlapping_eval"], c["data.seq_length"]
    if seq and c["task.task"] in ("WIKITEXT103", "PERPLEXITY") and step > seq:
        yield Problem(
            c.flag_text("task.overlapping_eval"), f"is more than `--seq-length {seq}`: tokens would be left out", f"1 to {seq}"
        )


def task_files(c: ConfigCheck) -> Iterator[Problem]:
    """The data files of a task can be read."""
    for name in ("task.train_data", "task.valid_data"):
        for word in c[name]:
            path = Path(word)
            # PERPLEXITY also accepts the prefix of an indexed dataset, which is not itself the path of a file.
            is_dataset = c["task.task"] == "PERPLEXITY" and os.path.exists(f"{word}.idx")
            if not os.path.exists(path) and not is_dataset:
                meant = suggest_prefix(word, "document") if c["task.task"] == "PERPLEXITY" else None
                yield Problem(c.options[name].text((word,)), "does not exist" + (f"; {meant}" if meant else ""))
            elif os.path.exists(path) and os.path.isdir(path) != (c["task.task"] == "RACE"):
                kind = "directories" if c["task.task"] == "RACE" else "files"
                yield Problem(
                    c.options[name].text((word,)),
                    f"is a {'directory' if os.path.isdir(path) else 'file'}; {c['task.task']} needs {kind}",
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
