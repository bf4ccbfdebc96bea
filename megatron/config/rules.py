"""Check that a configuration is legal, by applying the rules of all sections."""

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

# In the order in which their mistakes are reported.
SECTIONS = (model, layout, pipeline, tokenizer, data, batch, optim, precision, memory, checkpoint, eval, log, task)
EVERY_RUN: tuple[Rule, ...] = tuple(rule for section in SECTIONS for rule in section.RULES.every_run)
PRETRAINING_RULES: tuple[Rule, ...] = (*EVERY_RUN, *(rule for section in SECTIONS for rule in section.RULES.pretraining))
TASK_RULES: tuple[Rule, ...] = (*EVERY_RUN, *(rule for section in SECTIONS for rule in section.RULES.tasks))
DISK_RULES: tuple[Rule, ...] = (*(rule for section in SECTIONS for rule in section.RULES.disk), writable)


def examine(
    config: RunSettings,
    world_size: int,
    invalid: Collection[str] = (),
    planning: bool = False,
    rules: Sequence[Rule] = PRETRAINING_RULES,
) -> tuple[ConfigCheck, list[Problem]]:
    """Check a configuration by all rules that do not touch the disk.

    Args:
        config: the settings as the user gave them.
        world_size: number of ranks.
        invalid: names, `section.field`, of settings whose value could not be read; these have been reported already.
        planning: the command is a dry run.
        rules: the rules to apply: PRETRAINING_RULES or TASK_RULES.

    Returns:
        The view of the configuration, to which `check_files` applies the rules that look at the disk; and the problems.
    """
    range_problems = list(out_of_range(config))
    all_invalid = {name for name, _ in range_problems} | set(invalid)
    for name in all_invalid:  # reset to the default, so that other rules neither fail on the value nor report it again
        section, _, key = name.partition(".")
        section_settings = dataclasses.replace(getattr(config, section), **{key: by_name()[name].default})
        config = dataclasses.replace(config, **{section: section_settings})
    dp = data_parallel_size(config.layout, world_size)
    resolved = derive(config, world_size)
    checked = ConfigCheck(config, resolved, world_size, dp, by_name(), derive, frozenset(all_invalid), planning)
    return checked, [p for _, p in range_problems] + [p for rule in rules for p in rule(checked)]


def resolved_check(config: RunSettings, world_size: int = 1) -> ConfigCheck:
    """Return the view of a configuration that needs no derivation, to which the caller can apply single rules."""
    return ConfigCheck(config, config, world_size, None, by_name(), derive)


def check(config: RunSettings, world_size: int = 1) -> list[Problem]:
    """Return all mistakes in a pretraining configuration on `world_size` ranks, except those that are found on the disk."""
    return examine(config, world_size)[1]


def out_of_range(config: RunSettings) -> Iterator[tuple[str, Problem]]:
    """Yield `section.field` and a problem for every number outside its range and every string outside its choices."""
    for name, option in by_name().items():
        if option.section == "command":  # `config` has no section for the settings of the command
            continue
        value = getattr(getattr(config, option.section), option.field)
        if value is None:
            continue
        if option.legal and not option.legal.contains(value):
            yield name, Problem(option.text(value), f"must be {option.legal.text}")
        elif option.choices and value not in option.choices:
            yield name, Problem(option.text(value), "is not known", ", ".join(option.choices))


def check_files(checked: ConfigCheck) -> list[Problem]:
    """Return all mistakes in the files and directories that a configuration names."""
    return [p for rule in DISK_RULES for p in rule(checked)]


def remarks(checked: ConfigCheck) -> list[str]:
    """Return the lines of all sections' remarks, mostly on settings that have no effect in this configuration."""
    return [line for section in SECTIONS for remark in section.RULES.remarks for line in remark(checked)]


def divisible_remaining_sizes(config: RunConfig, world_size: int, consumed: int) -> list[Problem]:
    """Check that the remaining batch sizes of --step-batch-size-schedule divide over the data-parallel ranks.

    The sizes before `consumed` are not checked: the run may have had another number of ranks then.

    Args:
        config: the run's configuration.
        world_size: number of ranks.
        consumed: number of samples that the run has consumed.

    Returns:
        At most one problem.
    """
    batch, dp = config.batch, data_parallel_size(config.layout, world_size)
    if not batch.step_batch_size_schedule or config.eval.skip_train:
        return []
    sizes = [size for _, size in batch_size_phases(batch, consumed)]
    what = flag_text("batch.step_batch_size_schedule", batch.step_batch_size_schedule)
    return list(divisible_batch_sizes(what, sizes, batch.micro_batch_size, dp or 1))
