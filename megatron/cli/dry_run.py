"""Dry run: check a command and print what it would run, for any number of ranks, in one CPU process.

It opens the tokenizer, the datasets and the checkpoint that the run names. torch is imported only to read a checkpoint, and
after all checks to take sizes from the model.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from megatron.config.command_line.parse import Parsed, report_and_exit
from megatron.config.command_line.saved import from_json, to_toml
from megatron.config.compare import model_differences
from megatron.config.data import prefixes
from megatron.config.directories import checkpoint_entries
from megatron.config.errors import ConfigError, Problem
from megatron.config.options import by_name, flag_text
from megatron.config.rules import divisible_remaining_sizes
from megatron.config.schema import RunConfig
from megatron.config.tokenizer import TOKENIZER_FILES
from megatron.data.errors import DataError
from megatron.data.indexed import IndexedDataset
from megatron.data.matching import adopt_data_roles, check_tokenizer
from megatron.data.mock import MADE_UP
from megatron.data.tokenizer import Tokenizer, build_tokenizer

GPT2_VOCABULARY = 50257  # tokens; assumed when the tokenizer's files are not named, which a dry run allows for GPT-2's

TaskReader = Callable[[Parsed], tuple[RunConfig, list[str]]]


@dataclass(frozen=True)
class InputSummary:
    """Summary of the inputs of a run on the disk.

    Attributes:
        vocab_size: size of the vocabulary, unpadded.
        source: origin of that size, for the printed report.
        lines: one line per dataset and checkpoint.
    """

    vocab_size: int
    source: str
    lines: tuple[str, ...]


def dry_run(parsed: Parsed, program: str, read_task: TaskReader | None = None) -> int:
    """Print what a command would run, and return the exit status.

    Args:
        parsed: the command.
        program: name of the program, for messages.
        read_task: reads the inputs of a task's command, instead of those of a pretraining run; see `tasks.program.preview`.

    Raises:
        SystemExit: with status 2, for mistakes in the files.
    """
    config = parsed.config
    try:
        if read_task is None:
            found = inspect_inputs(config, parsed.world_size)
        else:
            config, told = read_task(parsed)
            found = InputSummary(config.model.known_vocab_size, "the checkpoint's", tuple(told))
    except ConfigError as error:
        report_and_exit(error, program)
    lines = [f"note: {note}" for note in parsed.notes]
    # Without the number of iterations that a task derives from its data: the printed file gives the same epochs.
    repeatable = replace(parsed.config, eval=config.eval)
    lines += ["# The resolved configuration, as a file for --config", to_toml(repeatable)]
    from megatron.plan.tables import report_plan  # imports torch, so only after all mistakes have been reported

    config = replace(config, model=replace(config.model, vocab_size=found.vocab_size))
    try:
        lines += report_plan(config, parsed.world_size, found.source, found.lines)
    except ConfigError as error:
        report_and_exit(error, program)
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


def inspect_inputs(config: RunConfig, world_size: int = 1) -> InputSummary:
    """Open everything that the run reads.

    Raises:
        ConfigError: something cannot be opened or does not fit; it holds all mistakes.
    """
    problems: list[Problem] = []  # collected, so that one dry run reports all
    lines: list[str] = []
    tokenizer, count, source = None, GPT2_VOCABULARY, "GPT-2's, since no tokenizer files are named"
    kind = config.tokenizer.tokenizer_type
    # The names of the fields begin with "tokenizer.", which the flags and the section lack.
    missing = [by_name()[n].flag for n in TOKENIZER_FILES.get(kind or "", ()) if getattr(config.tokenizer, n[10:]) is None]
    if not missing:
        try:
            tokenizer = build_tokenizer(config.tokenizer)
            count, source = tokenizer.vocab_size, str(kind)
        except DataError as error:
            problems.append(Problem(flag_text("tokenizer.tokenizer_type", kind), f"cannot be opened: {error}"))
    elif kind == "GPT2BPETokenizer":
        lines.append(f"a run also needs {' and '.join(missing)}")
    else:
        problems.append(Problem(flag_text("tokenizer.tokenizer_type", kind), f"needs `{missing[0]}`, also to know its size"))
    lines += _datasets(config, tokenizer, problems)
    if config.checkpoint.load is not None or (
        config.checkpoint.save is not None and checkpoint_entries(Path(config.checkpoint.save))
    ):
        lines += _checkpoint(config, world_size, problems)
    else:  # a fresh run has the whole schedule of batch sizes before it
        problems += divisible_remaining_sizes(config, world_size, 0)
    if problems:
        raise ConfigError(problems)
    return InputSummary(count, source, tuple(lines))


def _datasets(config: RunConfig, tokenizer: Tokenizer | None, problems: list[Problem]) -> list[str]:
    """Open the datasets; add mistakes to `problems`, and return a line for each."""
    lines = []
    if tokenizer is not None:
        with suppress(DataError):  # reported for the dataset below
            lines += adopt_data_roles(config.data, config.tokenizer, tokenizer)[1]
    for name in ("data_path", "train_data_path", "valid_data_path", "test_data_path"):
        for prefix in prefixes(getattr(config.data, name)) or ():
            try:
                dataset = IndexedDataset(prefix)
                if tokenizer is not None:
                    check_tokenizer(dataset, tokenizer)
                lines.append(f"dataset {dataset.prefix}: {dataset.document_count:,} documents, {dataset.token_count:,} tokens")
            except DataError as error:
                problems.append(Problem(flag_text(f"data.{name}", (prefix,)), f"cannot be opened: {error}"))
    if config.data.mock_data:
        return [MADE_UP]
    return lines or ["a run also needs --data-path"]


def _checkpoint(config: RunConfig, world_size: int, problems: list[Problem]) -> list[str]:
    """Look at the checkpoint to start from and at --save; add mistakes to `problems`, and return lines on both."""
    from megatron.checkpoint.layout import CheckpointError, read_config
    from megatron.train.resume import find_source, weights_alone
    from megatron.train.resumed_schedule import check_schedule
    from megatron.train.save_directory import check_save

    what = flag_text("checkpoint.load", config.checkpoint.load)
    try:
        # --auto-resume depends on what --save holds when the run starts, so the checkpoint of --load is the one to look at.
        source = find_source(replace(config.checkpoint, auto_resume=False))
        lines = check_save(source, config)
        if not config.checkpoint.auto_resume:
            problems += divisible_remaining_sizes(config, world_size, source.state.consumed_samples if source.progress else 0)
        if source.directory is None:
            return [*source.lines[:-1], *lines]
        if not config.checkpoint.auto_resume:
            check_schedule(source, config)
        held = from_json(read_config(source.directory)).model
        problems.extend(weights_alone(source))
    except CheckpointError as error:
        problems.append(Problem(what, f"cannot be loaded: {error}"))
        return []
    except ConfigError as error:
        problems.extend(error.problems)
        return []
    problems.extend(model_differences(held, config.model, str(source.directory)))
    return [*source.lines[:-1], *lines, f"checkpoint {source.directory}: complete"]
