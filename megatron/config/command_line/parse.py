"""The command line of a run: flags, `--help`, a TOML file, and one answer that holds every mistake.

    try:
        parsed = parse(sys.argv[1:], program="pretrain_gpt.py", world_size=world)
    except ConfigError as error:
        report_and_exit(error, "pretrain_gpt.py")  # and exit

A setting comes from the first of: the flag, the file of `--config`, `--preset`, the checkpoint (with
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
from megatron.config.errors import ConfigError, Problem, found_on_disk
from megatron.config.options import by_name
from megatron.config.outputs import check_outputs
from megatron.config.presets import PRESETS
from megatron.config.resolve import resolve
from megatron.config.rules import PRETRAINING_RULES, TASK_RULES, check_files, examine, remarks
from megatron.config.schema import RunConfig, assemble
from megatron.config.task import implied


@dataclass(frozen=True)
class Parsed:
    """A legal run.

    config: every derived setting filled in, apart from `model.vocab_size`, which the tokenizer knows.
    dry_run: only check and print. world_size: number of ranks. set_by_user: `section.field` of what the user set, by flag
    or file. notes: lines to print once, on what was understood differently from how it was typed.
    """

    config: RunConfig
    dry_run: bool
    world_size: int
    set_by_user: frozenset[str]
    notes: tuple[str, ...]


class HelpRequested(Exception):
    """Not a mistake: the answer to `--help` and `--version`, as text."""


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
    """Return the run that a command line means.

    Args:
        argv: the words after the program's name.
        program: its name, for --help.
        defaults: the program's own, `section.field` -> value.
        world_size: number of ranks.
        saved: reads the configuration of the checkpoint to load, as `to_json` wrote it, for --use-checkpoint-args; may
            raise ConfigError, OSError or ValueError.
        files: whether to look at the disk, but for files of settings.
        task: whether the program is tasks/main.py.

    Raises:
        ConfigError: with all mistakes at once.
        HelpRequested: for `--help` and `--version`.
    """
    if unknown := set(defaults or {}) - set(by_name()) - {"model.architecture"}:
        raise ValueError(f"defaults that are no `section.field` of a run: {sorted(unknown)}")
    flags = read_arguments(argv)
    _answer(flags, program, task)
    file = _read_file(flags)
    raw = _merge(flags, file, files=files, task=task)
    checkpoint = checkpoint_settings(raw.values, saved, raw.set_by_user, files=files, task=task)
    below = {**(defaults or {}), **checkpoint.values, **_preset(raw.values)}
    yielding, contradictions = _settle_yielding(below, raw.values, (flags, file))
    settings = assemble({**below, **yielding, **raw.values})
    dry_run = bool(raw.values.get("command.dry_run"))
    ranks, wrong_ranks = _ranks(raw.values.get("command.world_size"), world_size, dry_run)
    rules = TASK_RULES if task else PRETRAINING_RULES
    checked, broken = examine(settings, ranks, raw.invalid | checkpoint.unknown, planning=dry_run, rules=rules)
    problems = [*raw.problems, *checkpoint.problems, *contradictions, *wrong_ranks, *broken]
    if files:
        problems += found_on_disk([*check_files(checked), *check_outputs(checked, raw.settings_files)])
    if problems:  # what a file lacks that could not be read may be in another host's
        raise ConfigError(found_on_disk(problems) if file.problems else problems)
    taken = () if task else checkpoint.notes(raw.values)
    notes = (*flags.notes, *file.notes, *taken, *remarks(checked))
    config = resolve(checked.resolved, ranks)
    return Parsed(config, dry_run, ranks, raw.set_by_user | yielding.keys(), tuple(dict.fromkeys(notes)))


def report_and_exit(error: ConfigError, program: str, rank: int | None = None, advice: Sequence[str] = ()) -> NoReturn:
    """Print the mistakes on stderr, one a line, and exit with status 2. Only rank 0 prints.

    Args:
        error: the mistakes.
        program: its name, for the closing line.
        rank: of this process; by default what the launcher's variables say.
        advice: lines that follow the mistakes.
    """
    if _is_first(rank):
        lines = [f"error: {problem}" for problem in error.problems]
        count = f"{len(lines)} mistake{'s' if len(lines) > 1 else ''}"
        closing = f"{program}: {count} in the configuration; nothing was started. --help lists all flags."
        print(*lines, *advice, closing, sep="\n", file=sys.stderr, flush=True)
    sys.exit(2)


def _is_first(rank: int | None) -> bool:
    """Return whether this process speaks for all; a launcher's environment says which one it is."""
    if rank is not None:
        return rank == 0
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


def _answer(flags: Reading, program: str, task: bool) -> None:
    """Raise HelpRequested where the command line asks for help or for the version."""
    if flags.values.get("command.help"):
        raise HelpRequested(help_text(program, task=task))
    if flags.values.get("command.version"):
        raise HelpRequested(f"megatron {megatron.__version__}\n")


def _read_file(flags: Reading) -> Reading:
    """Return what the file of --config says; ConfigError where it cannot be read, with nothing of what it would have given."""
    path = flags.values.get("command.config")
    file = Reading() if path is None else read_toml(path)
    if file.broken:
        raise ConfigError([*flags.problems, *found_on_disk(file.problems)])
    return file


@dataclass(frozen=True)
class _Raw:
    """The settings of the user, flags and file together.

    values: by `section.field`, with files of data paths read and with what a task implies. set_by_user: names that were
    given. settings_files: the files that settings were read from. invalid: fields whose value could not be read.
    """

    values: Mapping[str, Any]
    set_by_user: frozenset[str]
    settings_files: list[str]
    problems: list[Problem]
    invalid: frozenset[str]


def _merge(flags: Reading, file: Reading, *, files: bool, task: bool) -> _Raw:
    given = {**file.values, **flags.values}
    values, wrong_lists = (dict(given), []) if task else expand_data_args(given, files=files)
    if task:
        values |= implied(values)
    invalid = (flags.invalid | file.invalid) - {"command.config", "command.preset", "command.world_size"}
    if wrong_lists:
        invalid.add("data.data_path")
    return _Raw(
        values=values,
        set_by_user=frozenset(name for name in given if not name.startswith("command.")),
        settings_files=[given[name] for name in ("command.config", *FILES) if given.get(name) is not None],
        problems=[*flags.problems, *file.problems, *wrong_lists],
        invalid=frozenset(invalid),
    )


def _preset(chosen: Mapping[str, Any]) -> dict[str, Any]:
    return {f"model.{key}": value for key, value in PRESETS.get(chosen.get("command.preset", ""), {}).items()}


def _ranks(wanted: int | None, world_size: int, dry_run: bool) -> tuple[int, list[Problem]]:
    """Return the number of ranks: what --world-size says in a dry run, else the launcher's; and what is wrong with the flag."""
    if wanted is None:
        return world_size, []
    if not dry_run:
        return world_size, [Problem(f"`--world-size {wanted}`", "goes with --dry-run; a run takes it from its launcher")]
    if wanted < 1:
        return world_size, [Problem(f"`--world-size {wanted}`", "must be greater than 0")]
    return wanted, []


def _settle_yielding(
    below: Mapping[str, Any], chosen: Mapping[str, Any], sources: Sequence[Reading]
) -> tuple[dict[str, Any], list[Problem]]:
    """Settle the flags that give way: `--no-position-embedding` beside rotary positions means no learned table, and no more.

    Args:
        below: what preset, checkpoint and program say.
        chosen: what the user says, by flags that do not give way.
        sources: the command line and the file.

    Returns:
        The values that nothing stands against, and a problem for each that contradicts what the user says.
    """
    alone: dict[str, Any] = {}
    problems = []
    for source in sources:
        for name, spelling in source.yielding.items():
            default = spelling.option.default
            if name not in chosen and below.get(name, default) == default:
                alone.setdefault(name, spelling.value)
            elif name in chosen and chosen[name] == default != spelling.value:
                flag = next(s.spelled[name] for s in sources if name in s.spelled)
                problems.append(Problem(f"`{flag}` and `{spelling.flag}`", "set the same thing to different values"))
    return alone, problems
