"""The command line of a run: flags, `--help`, a TOML file, and one answer that holds every mistake.

    try:
        parsed = parse(sys.argv[1:], program="pretrain_gpt.py", world_size=world)
    except ConfigError as error:
        explain(error, "pretrain_gpt.py")  # and exit

A setting comes from the first of: the flag, the file of `--config`, `--preset`, the checkpoint (with
--use-checkpoint-args), the program's own defaults, the schema. Imports no torch.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import megatron
from megatron.config import file_rules
from megatron.config.case import Case
from megatron.config.data_args import FILES, expand
from megatron.config.errors import ConfigError, Problem
from megatron.config.options import Option, by_name, options, say, sections
from megatron.config.other_flags.table import other_flags
from megatron.config.output_rules import check_outputs
from megatron.config.pipeline_rules import split_remarks
from megatron.config.precision_rules import precision_remarks
from megatron.config.presets import PRESETS
from megatron.config.reading import Reading, read_arguments, read_toml
from megatron.config.rules import PRETRAINING_RULES, examine
from megatron.config.saved import from_json, to_json, to_toml
from megatron.config.schedule_rules import batch_remarks, schedule_remarks
from megatron.config.schema import CheckpointConfig, RunConfig
from megatron.config.stage_split import pipeline_chunks
from megatron.config.task_rules import TASK_RULES
from megatron.config.tasks import implied

__all__ = ["Parsed", "explain", "from_json", "help_text", "parse", "to_json", "to_toml"]

ReadSaved = Callable[[CheckpointConfig], Mapping[str, Any]]


@dataclass(frozen=True)
class Parsed:
    """A legal run.

    config: every derived setting filled in (`rules.resolve`), apart from `model.vocab_size`, which the tokenizer knows.
    dry_run: only check and print. world_size: number of ranks. given: `section.field` of what the user set, by flag or
    file. notes: lines to print once, on what was understood differently from how it was typed.
    """

    config: RunConfig
    dry_run: bool
    world_size: int
    given: frozenset[str]
    notes: tuple[str, ...]


class HelpAsked(Exception):
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
    """The run that a command line means.

    defaults: the program's own, `section.field` -> value. saved: reads the configuration of the checkpoint to load, as
    `to_json` wrote it, for --use-checkpoint-args; may raise ConfigError, OSError or ValueError. files: whether to look at
    the disk, but for files of settings. task: whether the program is tasks/main.py.
    ConfigError with all mistakes at once; HelpAsked for `--help` and `--version`.
    """
    if strange := set(defaults or {}) - set(by_name()) - {"model.architecture"}:
        raise ValueError(f"defaults that are no `section.field` of a run: {sorted(strange)}")
    flags = read_arguments(argv)
    if flags.values.get("command.help"):
        raise HelpAsked(help_text(program, task=task))
    if flags.values.get("command.version"):
        raise HelpAsked(f"megatron {megatron.__version__}\n")
    path = flags.values.get("command.config")
    file = read_toml(path) if path is not None else Reading()
    if file.broken:  # one cause, one message: nothing of the settings that it would have given
        raise ConfigError([*flags.problems, *_on_disk(file.problems)])
    chosen = {**file.values, **flags.values}
    typed = frozenset(name for name in chosen if not name.startswith("command."))
    settings = [chosen[name] for name in ("command.config", *FILES) if chosen.get(name) is not None]
    chosen, wrong_lists = expand(chosen, files=files) if not task else (chosen, [])
    if task:
        chosen |= implied(chosen)
    preset = {f"model.{key}": value for key, value in PRESETS.get(chosen.get("command.preset", ""), {}).items()}
    problems = [*flags.problems, *file.problems, *wrong_lists]
    bad = (flags.bad | file.bad) - {"command.config", "command.preset", "command.world_size"}
    if wrong_lists:
        bad.add("data.data_path")
    checkpoint: dict[str, Any] = {}
    if chosen.get("checkpoint.use_checkpoint_args") and saved is not None and file_rules.first_start(_alone(chosen)):
        saved = None  # the sizes are those that the command itself gives
    if chosen.get("checkpoint.use_checkpoint_args") and saved is not None:
        checkpoint, wrong = _checkpoint_model(_assemble(chosen), saved, typed, task=task)
        problems += _on_disk(wrong)
    if saved is not None and not checkpoint and (task or chosen.get("checkpoint.use_checkpoint_args")):
        # One cause, one message: say nothing of the sizes that it would have given.
        bad |= {n for n in by_name() if n.startswith(("model.", "tokenizer.", "data.seq_length")) and n not in chosen}
    below = {**(defaults or {}), **checkpoint, **preset}
    alone, wrong = _settle_yielding(below, chosen, (flags, file))
    problems += wrong
    typed |= alone.keys()
    config = _assemble({**below, **alone, **chosen})
    dry_run = bool(chosen.get("command.dry_run"))
    if (wanted := chosen.get("command.world_size")) is not None:
        if not dry_run:
            problems.append(Problem(f"`--world-size {wanted}`", "goes with --dry-run; a run takes it from its launcher"))
        elif wanted < 1:
            problems.append(Problem(f"`--world-size {wanted}`", "must be greater than 0"))
        else:
            world_size = wanted
    case, broken = examine(config, world_size, bad, planning=dry_run, rules=TASK_RULES if task else PRETRAINING_RULES)
    problems += broken
    if files:
        problems += _on_disk([*file_rules.check_files(case), *check_outputs(case, settings)])
    if problems:  # what a file lacks that could not be read may be in another host's
        raise ConfigError(_on_disk(problems) if file.problems else problems)
    taken = () if task else _taken({name: value for name, value in checkpoint.items() if name not in chosen})
    notes = (*flags.notes, *file.notes, *taken, *_remarks(config, case.resolved))
    return Parsed(case.resolved, dry_run, world_size, typed, tuple(dict.fromkeys(notes)))


def explain(error: ConfigError, program: str, rank: int | None = None, advice: Sequence[str] = ()) -> NoReturn:
    """Print the mistakes on stderr, one a line, and exit with status 2. Only rank 0 prints.

    Args:
        error: the mistakes.
        program: its name, for the closing line.
        rank: of this process; by default what the launcher's variables say.
        advice: lines that follow the mistakes.
    """
    if _first(rank):
        lines = [f"error: {problem}" for problem in error.problems]
        count = f"{len(lines)} mistake{'s' if len(lines) > 1 else ''}"
        closing = f"{program}: {count} in the configuration; nothing was started. --help lists all flags."
        print(*lines, *advice, closing, sep="\n", file=sys.stderr, flush=True)
    sys.exit(2)


def _on_disk(problems: Sequence[Problem]) -> list[Problem]:
    """The same problems, marked as found on this host's disk."""
    return [dataclasses.replace(problem, on_disk=True) for problem in problems]


def _first(rank: int | None) -> bool:
    """Whether this process speaks for all; a launcher's environment says which one it is."""
    if rank is not None:
        return rank == 0
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


def _assemble(values: Mapping[str, Any]) -> RunConfig:
    """The schema's defaults with `section.field` values put in."""
    built = {}
    for section, config in sections().items():
        own = {name.split(".")[1]: v for name, v in values.items() if name.startswith(section + ".")}
        built[section] = config(**own)
    return RunConfig(**built)


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
                how = next(s.spelled[name] for s in sources if name in s.spelled)
                problems.append(Problem(f"`{how}` and `{spelling.flag}`", "set the same thing to different values"))
    return alone, problems


def _alone(chosen: Mapping[str, Any]) -> Case:
    """Return what the user typed as a case of its own, for rules that look at nothing else."""
    config = _assemble(chosen)
    return Case(config, config, 1, 1)


def _checkpoint_model(
    config: RunConfig, saved: ReadSaved, typed: frozenset[str], *, task: bool
) -> tuple[dict[str, Any], list[Problem]]:
    """Return the settings that the checkpoint of --load gives, and what is wrong with it.

    Args:
        config: as the command line and its file say.
        saved: reads the checkpoint's configuration.
        typed: settings that the user gave.
        task: whether the program is tasks/main.py, which sees as much as the model can, and asks the checkpoint itself for
            its tokenizer.

    Returns:
        The model's shape, the length of a sample and the tokenizer, each by `section.field`; nothing where `file_rules.load`
        has something to say of the checkpoint.
    """
    if config.checkpoint.load is None or list(file_rules.load(Case(config, config, 1, 1))):
        return {}, []
    try:
        held = from_json(saved(config.checkpoint))
    except ConfigError as error:
        return {}, list(error.problems)
    except (OSError, ValueError) as error:
        return {}, [Problem("`--use-checkpoint-args`", f"cannot read the checkpoint's configuration: {error}")]
    names = [f.name for f in dataclasses.fields(held.model) if f"model.{f.name}" in by_name()]  # not the tokenizer's size
    found = {f"model.{name}": getattr(held.model, name) for name in names}
    longest = held.model.max_position_embeddings
    found["data.seq_length"] = longest if task or held.data.seq_length is None else held.data.seq_length
    # A tokenizer comes whole from one place; which token ends a document can be said of any.
    own = {f"tokenizer.{f.name}" for f in dataclasses.fields(held.tokenizer)} - {"tokenizer.eod_token", "tokenizer.bos_token"}
    if not task and not typed & own:
        found |= {f"tokenizer.{f.name}": getattr(held.tokenizer, f.name) for f in dataclasses.fields(held.tokenizer)}
    return {name: value for name, value in found.items() if value is not None or name.startswith("model.")}, []


def _taken(checkpoint: Mapping[str, Any]) -> Iterator[str]:
    """Yield what to say of settings beyond the model's shape that the checkpoint gives."""
    taken = {name: checkpoint.get(name) for name in ("data.seq_length", "tokenizer.tokenizer_type")}
    words = [say(name, value).strip("`") for name, value in taken.items() if value is not None]
    if words:
        yield f"from the checkpoint, by --use-checkpoint-args: {', '.join(words)}"


def _remarks(typed: RunConfig, resolved: RunConfig) -> list[str]:
    """What was asked for and has no effect in this combination."""
    notes = []
    if typed.layout.sequence_parallel and not resolved.layout.sequence_parallel:
        notes.append("--sequence-parallel changes nothing: --tensor-model-parallel-size is 1")
    layout, layers = resolved.layout, resolved.model.num_layers
    virtual, ranks = layout.num_layers_per_virtual_pipeline_stage, layout.pipeline_model_parallel_size
    if virtual is not None and layers is not None and pipeline_chunks(layout, layers) == 1:
        why = f"{layers} layers on {ranks} pipeline ranks are one stage each"
        notes.append(f"--num-layers-per-virtual-pipeline-stage {virtual} changes nothing: {why}")
    if typed.checkpoint.save_interval is not None and typed.checkpoint.save is None:
        notes.append("--save-interval changes nothing: nothing is saved without --save")
    notes += [*split_remarks(typed.layout), *batch_remarks(resolved.batch)]
    return [*notes, *schedule_remarks(typed.optim, resolved.optim), *precision_remarks(typed.precision)]


def help_text(program: str, *, task: bool = False) -> str:
    """Every flag by section, with its default and its legal values. task: also those of tasks/main.py."""
    lines = [f"usage: {program} [--config run.toml] [--flag value ...]", "", "The command:"]
    known = {"command": "", **{name: (config.__doc__ or "").splitlines()[0] for name, config in sections().items()}}
    if not task:
        del known["task"]
    for section, doc in known.items():
        if section != "command":
            lines += ["", f"[{section}] {doc}"]
        for option in options():
            if option.section == section:
                lines += _describe(option)
    lines += ["", "Old flags of Megatron-LM, read as ours (with a note):"]
    lines += [f"  {row.flag:<40}  {' '.join(row.means)}" for row in other_flags().values() if row.means]
    quiet = sorted(row.flag for row in other_flags().values() if not row.refused and not row.means)
    lines += ["", "Accepted, and without effect (each says why when it is used):"]
    lines += textwrap.wrap(", ".join(quiet), 110, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
    lines += ["", "Every other flag of Megatron-LM, 23.06 to Core 0.19, is an error that names the feature it belongs to."]
    lines += ["", "In a TOML file the names in brackets are tables, and keys are the flags without their dashes."]
    return "\n".join(lines) + "\n"


def _describe(option: Option) -> list[str]:
    kind = option.metavar or {int: "N", float: "X", str: "TEXT", bool: ""}[option.kind]
    argument = f" {kind} ..." if option.many else f" {kind}" if kind else ""
    facts = []
    if option.choices:
        facts.append("one of " + ", ".join(option.choices))
    if option.kind is not bool and option.default not in (None, ()):
        facts.append(f"default {option.default}")
    facts += [
        f"{flag} means {value}" + (" unless another is given" if flag in option.yielding else "")
        for flag, value in option.constants.items()
    ]
    if option.aliases:
        facts.append("also " + ", ".join(option.aliases))
    text = ("turns off: " if option.off else "") + option.help + (f" ({'; '.join(facts)})" if facts else "")
    head = f"  {option.flag}{argument}"
    wrapped = textwrap.wrap(text, 82, break_on_hyphens=False)
    if len(head) > 36:
        return [head, *(" " * 38 + line for line in wrapped)]
    return [f"{head:<38}{wrapped[0]}", *(" " * 38 + line for line in wrapped[1:])]
