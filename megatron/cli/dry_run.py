"""Print what a run would do, without doing it: `--dry-run`, for any number of ranks, in one CPU process.

Opens the tokenizer, the datasets and the checkpoint that the run names, and says what is wrong before torch is
imported, which takes a checkpoint to look at or a model to read its sizes from.
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

GPT2_VOCABULARY = 50257

TaskReader = Callable[[Parsed], tuple[RunConfig, list[str]]]


@dataclass(frozen=True)
class InputSummary:
    """Summary of the inputs of a run on the disk.

    Attributes:
        vocabulary: its size.
        source: where that comes from, in words.
        lines: one per dataset and checkpoint.
    """

    vocabulary: int
    source: str
    lines: tuple[str, ...]


def dry_run(parsed: Parsed, program: str, look: TaskReader | None = None) -> int:
    """Print what a command would run, and return the exit status. Mistakes in the files end the process with status 2.

    Args:
        parsed: the command.
        program: name of the program, for messages.
        look: reads the inputs of a task's command, in place of those of a pretraining run; see `tasks.program.preview`.
    """
    config = parsed.config
    try:
        if look is None:
            found = inspect_inputs(config, parsed.world_size)
        else:
            config, told = look(parsed)
            found = InputSummary(config.model.known_vocab_size, "the checkpoint's", tuple(told))
    except ConfigError as error:
        report_and_exit(error, program)
    lines = [f"note: {note}" for note in parsed.notes]
    again = replace(parsed.config, eval=config.eval)  # without the length, which follows from a task's files
    lines += ["# The resolved configuration, as a file for --config", to_toml(again)]
    from megatron.plan.tables import report  # reads sizes from the model, which takes torch: after all mistakes

    config = replace(config, model=replace(config.model, vocab_size=found.vocabulary))
    try:
        lines += report(config, parsed.world_size, found.source, found.lines)
    except ConfigError as error:
        report_and_exit(error, program)
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


def inspect_inputs(config: RunConfig, world_size: int = 1) -> InputSummary:
    """Open everything that the run reads.

    Raises:
        ConfigError: all that is wrong.
    """
    problems: list[Problem] = []  # collected, so that one dry run tells all
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
    lines = []
    if tokenizer is not None:
        with suppress(DataError):  # said of the dataset below
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
    from megatron.checkpoint.layout import CheckpointError, read_config
    from megatron.train.resume import find_source, weights_alone
    from megatron.train.resumed_schedule import check_schedule
    from megatron.train.save_directory import check_save

    what = flag_text("checkpoint.load", config.checkpoint.load)
    try:
        # Of --auto-resume only a run itself can say what it will find: the checkpoint of --load is the one looked at.
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
