"""Take settings from the checkpoint that --load names: with --use-checkpoint-args, and always for tasks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron.config.checkpoint import CheckpointConfig, load_directory, may_start_empty
from megatron.config.command_line.saved import from_json
from megatron.config.errors import ConfigError, Problem, mark_on_disk
from megatron.config.options import by_name, flag_text
from megatron.config.rules import resolved_check
from megatron.config.schema import RunSettings, assemble

ReadSaved = Callable[[CheckpointConfig], Mapping[str, Any]]
# The user may give these without replacing the checkpoint's tokenizer: they apply to a tokenizer of any type.
TOKENIZER_INDEPENDENT = {"tokenizer.eod_token", "tokenizer.bos_token"}
# Prefixes of the names of the settings that a checkpoint gives.
CHECKPOINT_PREFIXES = ("model.", "tokenizer.", "data.seq_length")


@dataclass(frozen=True)
class FromCheckpoint:
    """Settings that a checkpoint gives to a run.

    Attributes:
        values: `section.field` -> value.
        problems: reasons why the checkpoint cannot be used.
        unknown: settings that the checkpoint would have given if it could be read; rules do not report them as missing, because
            the unreadable checkpoint has been reported already.
    """

    values: Mapping[str, Any] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()
    unknown: frozenset[str] = frozenset()

    def notes(self, user_values: Mapping[str, Any]) -> Iterator[str]:
        """Yield a note that names the sequence length and the tokenizer type if they come from the checkpoint.

        Args:
            user_values: the user's settings, by `section.field`, which override the checkpoint's.
        """
        names = ("data.seq_length", "tokenizer.tokenizer_type")
        taken = {name: self.values.get(name) for name in names if name not in user_values}
        flags = [flag_text(name, value).strip("`") for name, value in taken.items() if value is not None]
        if flags:
            yield f"from the checkpoint, by --use-checkpoint-args: {', '.join(flags)}"


def checkpoint_settings(
    user_values: Mapping[str, Any],
    read_saved: ReadSaved | None,
    set_by_user: frozenset[str],
    *,
    caller_checks_load: bool,
    task: bool,
) -> FromCheckpoint:
    """Return the checkpoint's model architecture, sequence length and tokenizer, if the command takes them from it.

    Args:
        user_values: the user's settings, by `section.field`, and those that follow from a task.
        read_saved: function that reads the checkpoint's configuration; None if the caller has none.
        set_by_user: names of the settings that the user gave.
        caller_checks_load: the caller reports problems with the directory of --load, so they are left out here.
        task: the program is tasks/main.py, which uses the model's maximum length and opens the checkpoint's tokenizer itself.

    Returns:
        The checkpoint's settings. `values` is empty if its directory or its configuration cannot be used.
    """
    requested = bool(user_values.get("checkpoint.use_checkpoint_args"))
    if read_saved is None or not (task or requested):
        return FromCheckpoint()
    values: dict[str, Any] = {}
    problems: list[Problem] = []
    if requested:
        config = assemble(user_values)
        checked = resolved_check(config)
        if may_start_empty(checked):  # a first start has no checkpoint yet, and takes its model from the command line
            return FromCheckpoint()
        load_problems = list(load_directory(checked))
        if load_problems:
            problems = [] if caller_checks_load else load_problems
        elif config.checkpoint.load is not None:
            values, problems = _read_settings(config, read_saved, set_by_user, task=task)
    if values:
        return FromCheckpoint(values)
    unknown = frozenset(name for name in by_name() if name.startswith(CHECKPOINT_PREFIXES) and name not in user_values)
    return FromCheckpoint(problems=tuple(mark_on_disk(problems)), unknown=unknown)


def _read_settings(
    config: RunSettings, read_saved: ReadSaved, set_by_user: frozenset[str], *, task: bool
) -> tuple[dict[str, Any], list[Problem]]:
    """Return the settings of the checkpoint, by `section.field`, and the problems that kept them from being read."""
    try:
        run = from_json(read_saved(config.checkpoint))
    except ConfigError as error:
        return {}, list(error.problems)
    except (OSError, ValueError) as error:
        return {}, [Problem("`--use-checkpoint-args`", f"cannot read the checkpoint's configuration: {error}")]
    # Only fields that a flag sets: the others, such as vocab_size, come from the program and the tokenizer.
    names = [f.name for f in dataclasses.fields(run.model) if f"model.{f.name}" in by_name()]
    found = {f"model.{name}": getattr(run.model, name) for name in names}
    max_length = run.model.max_position_embeddings
    found["data.seq_length"] = max_length if task or run.data.seq_length is None else run.data.seq_length
    tokenizer = {f"tokenizer.{f.name}": getattr(run.tokenizer, f.name) for f in dataclasses.fields(run.tokenizer)}
    # A tokenizer is taken as a whole: a mixture of the user's and the checkpoint's settings would be a third tokenizer.
    if not task and not set_by_user & (tokenizer.keys() - TOKENIZER_INDEPENDENT):
        found |= tokenizer
    return {name: value for name, value in found.items() if value is not None or name.startswith("model.")}, []
