"""Check that a configuration is legal: the rules of all sections, one after the other."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Sequence

from megatron.config import (
    batch,
    checkpoint,
    data,
    eval,
    layout,
    log,
    memory,
    model,
    optim,
    pipeline,
    precision,
    task,
    tokenizer,
)  # fmt: skip
from megatron.config.batch import batch_size_phases, divisible_batch_sizes
from megatron.config.check import ConfigCheck, Rule
from megatron.config.errors import Problem
from megatron.config.layout import data_parallel_size
from megatron.config.options import by_name, flag_text
from megatron.config.outputs import writable
from megatron.config.resolve import derive
from megatron.config.schema import RunConfig, RunSettings

SECTIONS = (model, layout, pipeline, tokenizer, data, batch, optim, precision, memory, checkpoint, eval, log, task)
EVERY_RUN: tuple[Rule, ...] = tuple(rule for section in SECTIONS for rule in section.RULES.every_run)
PRETRAINING_RULES: tuple[Rule, ...] = (*EVERY_RUN, *(rule for section in SECTIONS for rule in section.RULES.pretraining))
TASK_RULES: tuple[Rule, ...] = (*EVERY_RUN, *(rule for section in SECTIONS for rule in section.RULES.tasks))
DISK_RULES: tuple[Rule, ...] = (*(rule for section in SECTIONS for rule in section.RULES.disk), writable)


def examine(
    config: RunSettings,
    world: int,
    invalid: Collection[str] = (),
    planning: bool = False,
    rules: Sequence[Rule] = PRETRAINING_RULES,
) -> tuple[ConfigCheck, list[Problem]]:
    """Examine a configuration with all rules that need no disk.

    Args:
        config: as the user gave it.
        world: number of ranks.
        invalid: `section.field` of values that could not be read, which have been reported.
        planning: whether this is a dry run.
        rules: of the kind of run.

    Returns:
        What rules that look at the disk go on with, and the problems.
    """
    problems = list(out_of_range(config))
    unfit = {name for name, _ in problems} | set(invalid)
    for name in unfit:  # back to the default, so that no other rule stumbles over the same mistake
        section, _, key = name.partition(".")
        part = dataclasses.replace(getattr(config, section), **{key: by_name()[name].default})
        config = dataclasses.replace(config, **{section: part})
    dp = data_parallel_size(config.layout, world)
    checked = ConfigCheck(config, derive(config, world), world, dp, by_name(), derive, frozenset(unfit), planning)
    return checked, [p for _, p in problems] + [p for rule in rules for p in rule(checked)]


def resolved_check(config: RunSettings, world: int = 1) -> ConfigCheck:
    """Return what single rules look at, for a configuration in which nothing more is to be derived."""
    return ConfigCheck(config, config, world, None, by_name(), derive)


def check(config: RunSettings, world_size: int = 1) -> list[Problem]:
    """Everything that is wrong with `config` on `world_size` ranks, apart from files; empty when it is legal."""
    return examine(config, world_size)[1]


def out_of_range(config: RunSettings) -> Iterator[tuple[str, Problem]]:
    """(`section.field`, problem) of every number outside its range and every word outside its choices."""
    for name, option in by_name().items():
        if option.section == "command":
            continue
        value = getattr(getattr(config, option.section), option.field)
        if value is None:
            continue
        if option.legal and not option.legal.holds(value):
            yield name, Problem(option.text(value), f"must be {option.legal.text}")
        elif option.choices and value not in option.choices:
            yield name, Problem(option.text(value), "is not known", ", ".join(option.choices))


def check_files(checked: ConfigCheck) -> list[Problem]:
    """Everything that is wrong with what a configuration names on the disk."""
    return [p for rule in DISK_RULES for p in rule(checked)]


def remarks(checked: ConfigCheck) -> list[str]:
    """Return what was asked for and has no effect in this combination."""
    return [line for section in SECTIONS for remark in section.RULES.remarks for line in remark(checked)]


def divisible_remaining_sizes(config: RunConfig, world_size: int, consumed: int) -> list[Problem]:
    """The problem of the sizes that a resolved run still has before it after `consumed` samples, where there is one."""
    batch, dp = config.batch, data_parallel_size(config.layout, world_size)
    if not batch.step_batch_size_schedule or config.eval.skip_train:
        return []
    sizes = [size for _, size in batch_size_phases(batch, consumed)]
    what = flag_text("batch.step_batch_size_schedule", batch.step_batch_size_schedule)
    return list(divisible_batch_sizes(what, sizes, batch.micro_batch_size, dp or 1))
