"""Dry run: check a command and print what it would run, for any number of ranks, in one CPU process.

It opens the tokenizer, the datasets and the checkpoint that the settings name. torch is imported only to read a checkpoint,
and after all checks to compute the sizes of the model.
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
from megatron.data.matching import adopt_dataset_roles, check_tokenizer
from megatron.data.mock import MOCK_DATA_NOTE
from megatron.data.tokenizer import Tokenizer, build_tokenizer

GPT2_VOCAB_SIZE = 50257  # tokens; a dry run assumes it if the type is GPT-2's tokenizer and the files are not named

TaskReader = Callable[[Parsed], tuple[RunConfig, list[str]]]


@dataclass(frozen=True)
class InputSummary:
    """Summary of what a run reads from the disk.

    Attributes:
        vocab_size: unpadded size of the vocabulary.
        vocab_source: origin of that size, for the printed report.
        lines: lines of the report about datasets and checkpoint.
    """

    vocab_size: int
    vocab_source: str
    lines: tuple[str, ...]


def dry_run(parsed: Parsed, program: str, read_task: TaskReader | None = None) -> int:
    """Print the configuration and the plan of the run that a command would start, and return the exit status.

    Args:
        parsed: the command.
        program: name of the program, for messages.
        read_task: function that reads the inputs of a task, as `tasks.program.preview` does; None for a pretraining run.

    Raises:
        SystemExit: with status 2, for mistakes in the files.
    """
    config = parsed.config
    try:
        if read_task is None:
            inputs = inspect_inputs(config, parsed.world_size)
        else:
            config, task_lines = read_task(parsed)
            inputs = InputSummary(config.model.known_vocab_size, "the checkpoint's", tuple(task_lines))
    except ConfigError as error:
        report_and_exit(error, program)
    lines = [f"note: {note}" for note in parsed.notes]
    # For a task, print the configuration before its number of iterations was derived from the data: --epochs gives it again.
    printed = replace(parsed.config, eval=config.eval)
    lines += ["# The resolved configuration, as a file for --config", to_toml(printed)]
    from megatron.plan.tables import report_plan  # imports torch, so only after all mistakes have been reported

    config = replace(config, model=replace(config.model, vocab_size=inputs.vocab_size))
    try:
        lines += report_plan(config, parsed.world_size, inputs.vocab_source, inputs.lines)
    except ConfigError as error:
        report_and_exit(error, program)
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


def inspect_inputs(config: RunConfig, world_size: int = 1) -> InputSummary:
    """Open the tokenizer, the datasets and the checkpoint of a run.

    Raises:
        ConfigError: one of them cannot be opened or does not fit the configuration; the error lists all such problems.
    """
    problems: list[Problem] = []
    lines: list[str] = []
    tokenizer, vocab_size, source = None, GPT2_VOCAB_SIZE, "GPT-2's, since no tokenizer files are named"
    kind = config.tokenizer.tokenizer_type
    options = [by_name()[name] for name in TOKENIZER_FILES.get(kind or "", ())]
    missing = [option.flag for option in options if getattr(config.tokenizer, option.field) is None]
    if not missing:
        try:
            tokenizer = build_tokenizer(config.tokenizer)
            vocab_size, source = tokenizer.vocab_size, str(kind)
        except DataError as error:
            problems.append(Problem(flag_text("tokenizer.tokenizer_type", kind), f"cannot be opened: {error}"))
    elif kind == "GPT2BPETokenizer":
        lines.append(f"a run also needs {' and '.join(missing)}")
    else:
        problems.append(Problem(flag_text("tokenizer.tokenizer_type", kind), f"needs `{missing[0]}`, also to know its size"))
    lines += _inspect_datasets(config, tokenizer, problems)
    if config.checkpoint.load is not None or (
        config.checkpoint.save is not None and checkpoint_entries(Path(config.checkpoint.save))
    ):
        lines += _inspect_checkpoint(config, world_size, problems)
    else:  # a new run goes through all batch sizes of its schedule
        problems += divisible_remaining_sizes(config, world_size, 0)
    if problems:
        raise ConfigError(problems)
    return InputSummary(vocab_size, source, tuple(lines))


def _inspect_datasets(config: RunConfig, tokenizer: Tokenizer | None, problems: list[Problem]) -> list[str]:
    """Open the datasets and return a line of the report for each. Appends mistakes to `problems`."""
    lines = []
    if tokenizer is not None:
        with suppress(DataError):  # the loop below reports it, with the dataset's prefix
            lines += adopt_dataset_roles(config.data, config.tokenizer, tokenizer)[1]
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
        return [MOCK_DATA_NOTE]
    return lines or ["a run also needs --data-path"]


def _inspect_checkpoint(config: RunConfig, world_size: int, problems: list[Problem]) -> list[str]:
    """Check the checkpoint to start from and --save, and return lines of the report. Appends mistakes to `problems`."""
    from megatron.checkpoint.layout import CheckpointError, read_config
    from megatron.train.resume import find_source, weights_only_problems
    from megatron.train.resumed_schedule import check_schedule
    from megatron.train.save_directory import check_save

    what = flag_text("checkpoint.load", config.checkpoint.load)
    try:
        # --save may contain other checkpoints by the time that a run with --auto-resume starts, so only --load is inspected.
        source = find_source(replace(config.checkpoint, auto_resume=False))
        lines = check_save(source, config)
        if not config.checkpoint.auto_resume:
            problems += divisible_remaining_sizes(config, world_size, source.state.consumed_samples if source.progress else 0)
        if source.directory is None:
            return [*source.lines[:-1], *lines]
        if not config.checkpoint.auto_resume:
            check_schedule(source, config)
        saved_model = from_json(read_config(source.directory)).model
        problems.extend(weights_only_problems(source))
    except CheckpointError as error:
        problems.append(Problem(what, f"cannot be loaded: {error}"))
        return []
    except ConfigError as error:
        problems.extend(error.problems)
        return []
    problems.extend(model_differences(saved_model, config.model, str(source.directory)))
    return [*source.lines[:-1], *lines, f"checkpoint {source.directory}: complete"]
