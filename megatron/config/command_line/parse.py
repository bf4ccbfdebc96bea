"""Parse the command line of a run: flags, `--help`, and a TOML file, into a configuration or all mistakes at once.

    try:
        parsed = parse(sys.argv[1:], program="pretrain_gpt.py", world_size=world)
    except ConfigError as error:
        report_and_exit(error, "pretrain_gpt.py")

A setting has the value of the first of these that gives one: the flag, the file of `--config`, `--preset`, the checkpoint (with
--use-checkpoint-args), the program's own defaults, the schema. Imports no torch.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import megatron
from megatron.config.command_line.arguments import read_arguments
from megatron.config.command_line.data_args import FILES, expand_data_args
from megatron.config.command_line.from_checkpoint import ReadSaved, checkpoint_settings
from megatron.config.command_line.help import help_text
from megatron.config.command_line.reading import Reading
from megatron.config.command_line.toml_file import read_toml
from megatron.config.errors import ConfigError, Problem, mark_on_disk
from megatron.config.options import by_name
from megatron.config.outputs import check_outputs
from megatron.config.presets import PRESETS
from megatron.config.resolve import resolve
from megatron.config.rules import PRETRAINING_RULES, TASK_RULES, check_files, examine, remarks
from megatron.config.schema import RunConfig, assemble
from megatron.config.task import settings_from_task


@dataclass(frozen=True)
class Parsed:
    """A command without mistakes.

    Attributes:
        config: the resolved configuration, but for `model.vocab_size`, which the tokenizer gives.
        dry_run: only check and print.
        world_size: number of ranks.
        set_by_user: settings that flags or file give, by `section.field`.
        notes: lines to print once, on what was read differently from how it was typed, and on what has no effect.
    """

    config: RunConfig
    dry_run: bool
    world_size: int
    set_by_user: frozenset[str]
    notes: tuple[str, ...]


class HelpRequested(Exception):
    """The command asks for `--help` or `--version`; holds the text to print. Not a mistake."""


def parse(
    argv: Sequence[str],
    *,
    program: str,
    defaults: Mapping[str, Any] | None = None,
    world_size: int = 1,
    saved: ReadSaved | None = None,
    files: bool = True,
    task: bool = False,
) -> Parsed:
    """Parse and check a command line.

    Args:
        argv: the words after the program's name.
        program: name of the program, for --help.
        defaults: defaults of the program, `section.field` -> value.
        world_size: number of ranks.
        saved: reads the configuration of the checkpoint to load, as `to_json` wrote it, for --use-checkpoint-args; may
            raise ConfigError, OSError or ValueError.
        files: check files and directories too; files of settings are read in any case.
        task: the program is tasks/main.py.

    Raises:
        ConfigError: the command has mistakes; it holds all of them.
        HelpRequested: the command is `--help` or `--version`.
    """
    if unknown := set(defaults or {}) - set(by_name()) - {"model.architecture"}:
        raise ValueError(f"defaults that are no `section.field` of a run: {sorted(unknown)}")
    flags = read_arguments(argv)
    _answer_help(flags, program, task)  # before anything is checked: help is for those who do not know the flags yet
    file = _read_file(flags)
    raw = _merge(flags, file, files=files, task=task)
    checkpoint = checkpoint_settings(raw.values, saved, raw.set_by_user, files=files, task=task)
    # Later ones win: the program's defaults, the checkpoint, the preset, and over all of them what the user gave.
    base = {**(defaults or {}), **checkpoint.values, **_preset_values(raw.values)}
    fallbacks, contradictions = _settle_fallbacks(base, raw.values, (flags, file))
    settings = assemble({**base, **fallbacks, **raw.values})
    dry_run = bool(raw.values.get("command.dry_run"))
    ranks, wrong_ranks = _ranks(raw.values.get("command.world_size"), world_size, dry_run)
    rules = TASK_RULES if task else PRETRAINING_RULES
    checked, broken = examine(settings, ranks, raw.invalid | checkpoint.unknown, planning=dry_run, rules=rules)
    problems = [*raw.problems, *checkpoint.problems, *contradictions, *wrong_ranks, *broken]
    if files:
        problems += mark_on_disk([*check_files(checked), *check_outputs(checked, raw.settings_files)])
    if problems:  # a file that could not be read here may be sound on another host
        raise ConfigError(mark_on_disk(problems) if file.problems else problems)
    taken = () if task else checkpoint.notes(raw.values)
    notes = (*flags.notes, *file.notes, *taken, *remarks(checked))
    config = resolve(checked.resolved, ranks)
    return Parsed(config, dry_run, ranks, raw.set_by_user | fallbacks.keys(), tuple(dict.fromkeys(notes)))


def report_and_exit(error: ConfigError, program: str, rank: int | None = None, advice: Sequence[str] = ()) -> NoReturn:
    """Print the mistakes on stderr, one a line, and exit with status 2. Only rank 0 prints; all exit.

    Args:
        error: the mistakes.
        program: name of the program, for the last line.
        rank: rank of this process; by default from the launcher's environment variables.
        advice: lines to print after the mistakes.
    """
    if _is_first(rank):
        lines = [f"error: {problem}" for problem in error.problems]
        count = f"{len(lines)} mistake{'s' if len(lines) > 1 else ''}"
        closing = f"{program}: {count} in the configuration; nothing was started. --help lists all flags."
        print(*lines, *advice, closing, sep="\n", file=sys.stderr, flush=True)
    sys.exit(2)


def _is_first(rank: int | None) -> bool:
    """Return whether this is rank 0, by torchrun's or SLURM's environment variables if `rank` is None."""
    if rank is not None:
        return rank == 0
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


def _answer_help(flags: Reading, program: str, task: bool) -> None:
    """Raise HelpRequested if the command line asks for help or for the version."""
    if flags.values.get("command.help"):
        raise HelpRequested(help_text(program, task=task))
    if flags.values.get("command.version"):
        raise HelpRequested(f"megatron {megatron.__version__}\n")


def _read_file(flags: Reading) -> Reading:
    """Read the file of --config, if there is one.

    Raises:
        ConfigError: the file cannot be read. It holds no mistakes of settings that the file might have given.
    """
    path = flags.values.get("command.config")
    file = Reading() if path is None else read_toml(path)
    if file.broken:
        raise ConfigError([*flags.problems, *mark_on_disk(file.problems)])
    return file


@dataclass(frozen=True)
class _UserSettings:
    """Settings of the user: flags and file merged.

    Attributes:
        values: `section.field` -> value, with data paths read from their files, and with those that follow from a task.
        set_by_user: names of the settings that were given.
        settings_files: the files that settings were read from.
        problems: mistakes so far.
        invalid: names of the settings whose value could not be read.
    """

    values: Mapping[str, Any]
    set_by_user: frozenset[str]
    settings_files: list[str]
    problems: list[Problem]
    invalid: frozenset[str]


def _merge(flags: Reading, file: Reading, *, files: bool, task: bool) -> _UserSettings:
    """Merge the settings of the command line and the file; see `parse` for `files` and `task`."""
    given = {**file.values, **flags.values}  # a flag wins over the file
    values, wrong_lists = (dict(given), []) if task else expand_data_args(given, files=files)
    if task:
        values |= settings_from_task(values)
    # Rules know only settings of the run, not those of the command.
    invalid = (flags.invalid | file.invalid) - {"command.config", "command.preset", "command.world_size"}
    if wrong_lists:
        invalid.add("data.data_path")
    return _UserSettings(
        values=values,
        set_by_user=frozenset(name for name in given if not name.startswith("command.")),
        settings_files=[given[name] for name in ("command.config", *FILES) if given.get(name) is not None],
        problems=[*flags.problems, *file.problems, *wrong_lists],
        invalid=frozenset(invalid),
    )


def _preset_values(chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of --preset, by `section.field`."""
    return {f"model.{key}": value for key, value in PRESETS.get(chosen.get("command.preset", ""), {}).items()}


def _ranks(requested: int | None, world_size: int, dry_run: bool) -> tuple[int, list[Problem]]:
    """Return the number of ranks, from --world-size in a dry run and else the launcher's, and mistakes in the flag.

    Args:
        requested: value of --world-size.
        world_size: number of ranks that the launcher has started.
        dry_run: the command is a dry run.
    """
    if requested is None:
        return world_size, []
    if not dry_run:
        return world_size, [Problem(f"`--world-size {requested}`", "goes with --dry-run; a run takes it from its launcher")]
    if requested < 1:
        return world_size, [Problem(f"`--world-size {requested}`", "must be greater than 0")]
    return requested, []


def _settle_fallbacks(
    base: Mapping[str, Any], chosen: Mapping[str, Any], sources: Sequence[Reading]
) -> tuple[dict[str, Any], list[Problem]]:
    """Apply the fallback flags, which hold only when nothing else sets their field.

    `--no-position-embedding` is one: beside `--position-embedding-type rope` it means no learned table, which is so anyway.

    Args:
        base: settings of preset, checkpoint and program.
        chosen: settings of the user, by other flags.
        sources: the command line and the file.

    Returns:
        The values of the fallbacks that hold, and a problem for each that contradicts a setting of the user.
    """
    alone: dict[str, Any] = {}
    problems = []
    for source in sources:
        for name, spelling in source.fallbacks.items():
            default = spelling.option.default
            if name not in chosen and base.get(name, default) == default:
                alone.setdefault(name, spelling.value)
            elif name in chosen and chosen[name] == default != spelling.value:  # the user gave the very default
                flag = next(s.spelled[name] for s in sources if name in s.spelled)
                problems.append(Problem(f"`{flag}` and `{spelling.flag}`", "set the same thing to different values"))
    return alone, problems
