"""Parse the command line of a run: flags, `--help`, and a TOML file, into a configuration or all mistakes at once.

    try:
        parsed = parse(sys.argv[1:], program="pretrain_gpt.py", world_size=world)
    except ConfigError as error:
        report_and_exit(error, "pretrain_gpt.py")

A setting takes its value from the first of these sources that gives one: the flag, the file of `--config`, `--preset`, the
checkpoint (with --use-checkpoint-args), the program's own defaults, the schema's defaults. Imports no torch.
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
        config: the resolved configuration, except `model.vocab_size`, which comes from the tokenizer.
        dry_run: the command is to be checked and printed, not run.
        world_size: number of ranks.
        set_by_user: names, `section.field`, of the settings that flags or the file of --config give.
        notes: lines to print once, about flags that were interpreted differently from how they were typed, or have no effect.
    """

    config: RunConfig
    dry_run: bool
    world_size: int
    set_by_user: frozenset[str]
    notes: tuple[str, ...]


class HelpRequested(Exception):
    """Raised for `--help` and `--version`, which are no mistakes. Its text is what the program should print."""


def parse(
    argv: Sequence[str],
    *,
    program: str,
    defaults: Mapping[str, Any] | None = None,
    world_size: int = 1,
    read_saved: ReadSaved | None = None,
    check_disk: bool = True,
    task: bool = False,
) -> Parsed:
    """Parse and check a command line.

    Args:
        argv: the words after the program's name.
        program: name of the program, for --help.
        defaults: defaults of the program, `section.field` -> value.
        world_size: number of ranks.
        read_saved: function that reads the configuration of the checkpoint to load, as `to_json` wrote it, for
            --use-checkpoint-args; it may raise ConfigError, OSError or ValueError.
        check_disk: check also the files and directories that the settings name. Files that contain settings are always read.
        task: the program is tasks/main.py.

    Raises:
        ConfigError: the command has mistakes; the error lists all of them.
        HelpRequested: the command is `--help` or `--version`.
    """
    if unknown := set(defaults or {}) - set(by_name()) - {"model.architecture"}:
        raise ValueError(f"defaults that are no `section.field` of a run: {sorted(unknown)}")
    flags = read_arguments(argv)
    _raise_help(flags, program, task)  # before any check, so that --help is answered beside mistakes too
    file = _read_file(flags)
    user = _merge(flags, file, check_disk=check_disk, task=task)
    checkpoint = checkpoint_settings(user.values, read_saved, user.set_by_user, caller_checks_load=check_disk, task=task)
    # In ascending precedence: the program's defaults, the checkpoint, the preset; the user's settings override all of them.
    base = {**(defaults or {}), **checkpoint.values, **_preset_values(user.values)}
    fallbacks, contradictions = _apply_fallbacks(base, user.values, (flags, file))
    settings = assemble({**base, **fallbacks, **user.values})
    dry_run = bool(user.values.get("command.dry_run"))
    ranks, rank_problems = _ranks(user.values.get("command.world_size"), world_size, dry_run)
    rules = TASK_RULES if task else PRETRAINING_RULES
    checked, rule_problems = examine(settings, ranks, user.invalid | checkpoint.unknown, planning=dry_run, rules=rules)
    problems = [*user.problems, *checkpoint.problems, *contradictions, *rank_problems, *rule_problems]
    if check_disk:
        problems += mark_on_disk([*check_files(checked), *check_outputs(checked, user.settings_files)])
    if problems:  # the file of --config may differ between hosts, and its mistakes with it
        raise ConfigError(mark_on_disk(problems) if file.problems else problems)
    checkpoint_notes = () if task else checkpoint.notes(user.values)
    notes = (*flags.notes, *file.notes, *checkpoint_notes, *remarks(checked))
    config = resolve(checked.resolved, ranks)
    return Parsed(config, dry_run, ranks, user.set_by_user | fallbacks.keys(), tuple(dict.fromkeys(notes)))


def report_and_exit(error: ConfigError, program: str, rank: int | None = None, advice: Sequence[str] = ()) -> NoReturn:
    """Print the mistakes on stderr, one per line, and exit with status 2. Rank 0 alone prints; every rank exits.

    Args:
        error: the mistakes.
        program: name of the program, for the last line.
        rank: rank of this process; if None, it is read from the launcher's environment variables.
        advice: lines to print after the mistakes.
    """
    if _is_first(rank):
        lines = [f"error: {problem}" for problem in error.problems]
        count = f"{len(lines)} mistake{'s' if len(lines) > 1 else ''}"
        closing = f"{program}: {count} in the configuration; nothing was started. --help lists all flags."
        print(*lines, *advice, closing, sep="\n", file=sys.stderr, flush=True)
    sys.exit(2)


def _is_first(rank: int | None) -> bool:
    """Return whether this process is rank 0; if `rank` is None, torchrun's or SLURM's environment variables tell."""
    if rank is not None:
        return rank == 0
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


def _raise_help(flags: Reading, program: str, task: bool) -> None:
    """Raise HelpRequested if the command line asks for help or for the version."""
    if flags.values.get("command.help"):
        raise HelpRequested(help_text(program, task=task))
    if flags.values.get("command.version"):
        raise HelpRequested(f"megatron {megatron.__version__}\n")


def _read_file(flags: Reading) -> Reading:
    """Read the file of --config; without the flag, return an empty reading.

    Raises:
        ConfigError: the file cannot be read. Settings are then not reported as missing, because the file may contain them.
    """
    path = flags.values.get("command.config")
    file = Reading() if path is None else read_toml(path)
    if file.broken:
        raise ConfigError([*flags.problems, *mark_on_disk(file.problems)])
    return file


@dataclass(frozen=True)
class _UserSettings:
    """The user's settings, merged from flags and file.

    Attributes:
        values: `section.field` -> value, including data paths read from their files, and settings that follow from a task.
        set_by_user: names of the settings that flags or file give.
        settings_files: paths of the files that settings were read from.
        problems: mistakes in flags, file and files of data paths.
        invalid: names of the settings whose value could not be read.
    """

    values: Mapping[str, Any]
    set_by_user: frozenset[str]
    settings_files: list[str]
    problems: list[Problem]
    invalid: frozenset[str]


def _merge(flags: Reading, file: Reading, *, check_disk: bool, task: bool) -> _UserSettings:
    """Merge the settings of the command line and the file; see `parse` for `check_disk` and `task`."""
    given = {**file.values, **flags.values}  # flags override the file
    values, data_problems = (dict(given), []) if task else expand_data_args(given, check_datasets=check_disk)
    if task:
        values |= settings_from_task(values)
    # `examine` takes only names of a run's settings, not those of the command's.
    invalid = (flags.invalid | file.invalid) - {"command.config", "command.preset", "command.world_size"}
    if data_problems:
        invalid.add("data.data_path")
    return _UserSettings(
        values=values,
        set_by_user=frozenset(name for name in given if not name.startswith("command.")),
        settings_files=[given[name] for name in ("command.config", *FILES) if given.get(name) is not None],
        problems=[*flags.problems, *file.problems, *data_problems],
        invalid=frozenset(invalid),
    )


def _preset_values(user_values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of --preset, by `section.field`; empty without the flag."""
    return {f"model.{key}": value for key, value in PRESETS.get(user_values.get("command.preset", ""), {}).items()}


def _ranks(requested: int | None, world_size: int, dry_run: bool) -> tuple[int, list[Problem]]:
    """Return the number of ranks, and the mistakes in --world-size, which replaces the launcher's number in a dry run.

    Args:
        requested: value of --world-size.
        world_size: number of ranks that the launcher has started.
        dry_run: the command is a dry run.
    """
    if requested is None:
        return world_size, []
    if not dry_run:
        rule = "needs --dry-run; a run takes its number of ranks from the launcher"
        return world_size, [Problem(f"`--world-size {requested}`", rule)]
    if requested < 1:
        return world_size, [Problem(f"`--world-size {requested}`", "must be greater than 0")]
    return requested, []


def _apply_fallbacks(
    base: Mapping[str, Any], user_values: Mapping[str, Any], sources: Sequence[Reading]
) -> tuple[dict[str, Any], list[Problem]]:
    """Apply the fallback flags, which set their field only if nothing else does.

    An example is `--no-position-embedding`. In Megatron-LM it excludes a learned table, so scripts give it beside
    `--position-embedding-type rope`, where it must not change the type to none.

    Args:
        base: settings of preset, checkpoint and program, by `section.field`.
        user_values: settings that the user gave by other flags.
        sources: what was read from the command line and from the file.

    Returns:
        The values of the fallback flags that apply, and a problem for each one that contradicts a setting of the user.
    """
    applied: dict[str, Any] = {}
    problems = []
    for source in sources:
        for name, spelling in source.fallbacks.items():
            default = spelling.option.default
            if name not in user_values and base.get(name, default) == default:
                applied.setdefault(name, spelling.value)
            # The fallback gives way to a value, but contradicts a default that the user spelled out.
            elif name in user_values and user_values[name] == default != spelling.value:
                flag = next(s.spelled[name] for s in sources if name in s.spelled)
                problems.append(Problem(f"`{flag}` and `{spelling.flag}`", "set the same thing to different values"))
    return applied, problems
