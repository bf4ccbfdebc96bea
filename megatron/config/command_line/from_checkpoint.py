"""Take settings from the checkpoint of --load: with --use-checkpoint-args, and for every task."""

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
# Apply to any tokenizer, so that giving them does not replace the checkpoint's.
FREE_OF_TOKENIZER = {"tokenizer.eod_token", "tokenizer.bos_token"}


@dataclass(frozen=True)
class FromCheckpoint:
    """Settings that a checkpoint gives to a run.

    Attributes:
        values: `section.field` -> value.
        problems: mistakes in the checkpoint.
        unknown: settings that it would have given if it could be read. That they are missing is not reported: one cause, one
            message.
    """

    values: Mapping[str, Any] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()
    unknown: frozenset[str] = frozenset()

    def notes(self, chosen: Mapping[str, Any]) -> Iterator[str]:
        """Yield a note of the sequence length and the tokenizer that come from the checkpoint.

        Args:
            chosen: settings of the user, which win over the checkpoint's.
        """
        names = ("data.seq_length", "tokenizer.tokenizer_type")
        taken = {name: self.values.get(name) for name in names if name not in chosen}
        words = [flag_text(name, value).strip("`") for name, value in taken.items() if value is not None]
        if words:
            yield f"from the checkpoint, by --use-checkpoint-args: {', '.join(words)}"


def checkpoint_settings(
    chosen: Mapping[str, Any], saved: ReadSaved | None, set_by_user: frozenset[str], *, files: bool, task: bool
) -> FromCheckpoint:
    """Return the checkpoint's model architecture, sequence length and tokenizer, if the command asks for them.

    Args:
        chosen: settings of the user, by `section.field`, with those that follow from a task.
        saved: reads the checkpoint's configuration; None when there is nothing to read it with.
        set_by_user: names of the settings that the user gave.
        files: the caller checks the directory of --load itself.
        task: the program is tasks/main.py, which uses the model's maximum length and opens the checkpoint's tokenizer itself.

    Returns:
        The checkpoint's settings; none when its directory is at fault.
    """
    asked = bool(chosen.get("checkpoint.use_checkpoint_args"))
    if saved is None or not (task or asked):
        return FromCheckpoint()
    values: dict[str, Any] = {}
    problems: list[Problem] = []
    if asked:
        config = assemble(chosen)
        checked = resolved_check(config)
        if may_start_empty(checked):  # the command itself gives the sizes
            return FromCheckpoint()
        wrong = list(load_directory(checked))
        if wrong:
            problems = [] if files else wrong
        elif config.checkpoint.load is not None:
            values, problems = _read_settings(config, saved, set_by_user, task=task)
    if values:
        return FromCheckpoint(values)
    sizes = ("model.", "tokenizer.", "data.seq_length")  # beginnings of names
    unknown = frozenset(name for name in by_name() if name.startswith(sizes) and name not in chosen)
    return FromCheckpoint(problems=tuple(mark_on_disk(problems)), unknown=unknown)


def _read_settings(
    config: RunSettings, saved: ReadSaved, set_by_user: frozenset[str], *, task: bool
) -> tuple[dict[str, Any], list[Problem]]:
    try:
        run = from_json(saved(config.checkpoint))
    except ConfigError as error:
        return {}, list(error.problems)
    except (OSError, ValueError) as error:
        return {}, [Problem("`--use-checkpoint-args`", f"cannot read the checkpoint's configuration: {error}")]
    # Without vocab_size, which no flag sets.
    names = [f.name for f in dataclasses.fields(run.model) if f"model.{f.name}" in by_name()]
    found = {f"model.{name}": getattr(run.model, name) for name in names}
    longest = run.model.max_position_embeddings
    found["data.seq_length"] = longest if task or run.data.seq_length is None else run.data.seq_length
    tokenizer = {f"tokenizer.{f.name}": getattr(run.tokenizer, f.name) for f in dataclasses.fields(run.tokenizer)}
    if not task and not set_by_user & (tokenizer.keys() - FREE_OF_TOKENIZER):  # all of a tokenizer, or none of it
        found |= tokenizer
    return {name: value for name, value in found.items() if value is not None or name.startswith("model.")}, []
