"""The rules of tasks/main.py: what a task needs, and what of a pretraining run it has no use for."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from megatron.config.case import Case, Rule
from megatron.config.errors import Problem
from megatron.config.options import flag_text
from megatron.config.rules import COMMON_RULES
from megatron.config.tasks import TASKS
from megatron.files.prefixes import meant_prefix
from megatron.files.regular import kind_of_file

# What decides the samples and the length of a pretraining run.
FOREIGN = (
    "data.data_path", "data.train_data_path", "data.valid_data_path", "data.test_data_path", "data.mock_data",
    "data.data_args_path", "data.per_split_data_args_path", "data.split",
    "data.dataloader_type", "batch.train_iters", "batch.train_samples", "batch.rampup_batch_size",
    "batch.step_batch_size_schedule", "batch.decrease_batch_size_if_needed", "data.mask_prob", "data.short_seq_prob",
)  # fmt: skip


def task_named(c: Case) -> Iterator[Problem]:
    """Which task."""
    if c["task.task"] is None and "task.task" not in c.bad:
        yield Problem("`--task`", "is missing, and has no default", ", ".join(TASKS))


def model_named(c: Case) -> Iterator[Problem]:
    """A task is asked of a model that is there."""
    if c["task.task"] is None:  # which is said elsewhere; what --load means follows from it
        return
    if c["checkpoint.load"] is None and not c.bad & {"checkpoint.load", "task.pretrained_checkpoint"}:
        yield Problem(
            "`--load`", "is missing: the checkpoint to evaluate; `--pretrained-checkpoint` begins fine-tuning from one"
        )
    if c["task.pretrained_checkpoint"] is not None and c["checkpoint.load"] != c["task.pretrained_checkpoint"]:
        both = c.flag_text("task.pretrained_checkpoint", "checkpoint.load")
        rule = "exclude each other: the first begins fine-tuning, the second goes on with it or evaluates what it gave"
        yield Problem(both, f"{rule}; with --auto-resume a run that was interrupted goes on from its --save")


def task_data(c: Case) -> Iterator[Problem]:
    """Something to evaluate or to train on; for tasks that ask a pretrained model only the former."""
    kind = TASKS.get(c["task.task"] or "")
    if kind is None:
        return
    train, valid = c["task.train_data"], c["task.valid_data"]
    if kind.head is None:
        for name in ("task.train_data", "task.epochs", "task.pretrained_checkpoint"):
            if c.given(name):
                yield Problem(c.flag_text(name), f"does not go with --task {c['task.task']}, which trains nothing")
    elif train and c["task.epochs"] is None and "task.epochs" not in c.bad:
        yield Problem(c.flag_text("task.train_data"), "needs `--epochs`, the number of passes over it")
    elif c["task.epochs"] and not train:
        yield Problem(c.flag_text("task.epochs"), "needs `--train-data`")
    if not valid and (kind.head is None or c["eval.skip_train"]):
        yield Problem("`--valid-data`", "is missing: the files to evaluate")


def foreign_to_tasks(c: Case) -> Iterator[Problem]:
    """A setting that a task does not have would silently do nothing."""
    for name in FOREIGN:
        if c.given(name):
            instead = "--train-data, --valid-data and --epochs say what is read, and how long"
            yield Problem(c.flag_text(name), f"belongs to pretraining; leave it out: {instead}")


def whole_sequences(c: Case) -> Iterator[Problem]:
    """Windows and samples of a task are short: their ranks are better used for data parallelism."""
    if c["layout.context_parallel_size"] != 1:
        yield Problem(
            c.flag_text("layout.context_parallel_size"),
            "is for pretraining; a task takes these ranks for data parallelism",
            "1",
        )


def windows(c: Case) -> Iterator[Problem]:
    """Each window goes on beyond the last one, and leaves no gap."""
    step, seq = c["task.overlapping_eval"], c["data.seq_length"]
    if seq and c["task.task"] in ("WIKITEXT103", "PERPLEXITY") and step > seq:
        yield Problem(
            c.flag_text("task.overlapping_eval"), f"is more than `--seq-length {seq}`: tokens would be left out", f"1 to {seq}"
        )


def task_files(c: Case) -> Iterator[Problem]:
    """What is to be read is there."""
    for name in ("task.train_data", "task.valid_data"):
        for word in c[name]:
            path = Path(word)
            dataset = c["task.task"] == "PERPLEXITY" and os.path.exists(f"{word}.idx")
            if not os.path.exists(path) and not dataset:
                meant = meant_prefix(word, "document") if c["task.task"] == "PERPLEXITY" else None
                yield Problem(flag_text(name, (word,)), "does not exist" + (f"; {meant}" if meant else ""))
            elif os.path.exists(path) and os.path.isdir(path) != (c["task.task"] == "RACE"):
                kind = "directories" if c["task.task"] == "RACE" else "files"
                yield Problem(
                    flag_text(name, (word,)),
                    f"is a {'directory' if os.path.isdir(path) else 'file'}; {c['task.task']} comes in {kind}",
                )
            elif os.path.exists(path) and not os.path.isdir(path) and (kind := kind_of_file(path.stat().st_mode)):
                yield Problem(flag_text(name, (word,)), f"is {kind}, not a regular file")
            elif os.path.exists(path) and not os.access(path, os.R_OK):
                yield Problem(flag_text(name, (word,)), "cannot be read: permission denied")


TASK_RULES: tuple[Rule, ...] = (
    *COMMON_RULES, task_named, model_named, task_data, foreign_to_tasks, whole_sequences, windows,
)  # fmt: skip
