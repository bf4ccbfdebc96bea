"""The settings that the checkpoint of --load gives: with --use-checkpoint-args, and in every task."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron.config.checkpoint import CheckpointConfig, first_start, load
from megatron.config.command_line.saved import from_json
from megatron.config.errors import ConfigError, Problem, found_on_disk
from megatron.config.options import by_name, flag_text
from megatron.config.rules import resolved_check
from megatron.config.schema import RunSettings, assemble

ReadSaved = Callable[[CheckpointConfig], Mapping[str, Any]]
FREE_OF_TOKENIZER = {"tokenizer.eod_token", "tokenizer.bos_token"}  # which token ends a document can be said of any tokenizer


@dataclass(frozen=True)
class FromCheckpoint:
    """The settings that a checkpoint gives to a run.

    values: `section.field` -> value. problems: what is wrong with the checkpoint. unknown: settings that it would have given
    if it could be read, of which nobody says that they are missing: one cause, one message.
    """

    values: Mapping[str, Any] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()
    unknown: frozenset[str] = frozenset()

    def notes(self, chosen: Mapping[str, Any]) -> Iterator[str]:
        """Yield what to say of settings beyond the model's shape that the checkpoint gives.

        Args:
            chosen: what the user set, which wins over the checkpoint.
        """
        names = ("data.seq_length", "tokenizer.tokenizer_type")
        taken = {name: self.values.get(name) for name in names if name not in chosen}
        words = [flag_text(name, value).strip("`") for name, value in taken.items() if value is not None]
        if words:
            yield f"from the checkpoint, by --use-checkpoint-args: {', '.join(words)}"


def checkpoint_settings(
    chosen: Mapping[str, Any], saved: ReadSaved | None, set_by_user: frozenset[str], *, files: bool, task: bool
) -> FromCheckpoint:
    """Return the model's shape, the length of a sample and the tokenizer, where the checkpoint is asked for them.

    Args:
        chosen: what the user set, by `section.field`, with what follows from it.
        saved: reads the checkpoint's configuration; None where nothing can be read.
        set_by_user: settings that the user gave.
        files: whether the caller looks at the disk itself, and says what is wrong with the directory of --load.
        task: whether the program is tasks/main.py, which sees as much as the model can, and asks the checkpoint itself for
            its tokenizer.

    Returns:
        The checkpoint's settings; none where `checkpoint.load` has something to say of its directory.
    """
    asked = bool(chosen.get("checkpoint.use_checkpoint_args"))
    if saved is None or not (task or asked):
        return FromCheckpoint()
    values: dict[str, Any] = {}
    problems: list[Problem] = []
    if asked:
        config = assemble(chosen)
        checked = resolved_check(config)
        if first_start(checked):  # the sizes are those that the command itself gives
            return FromCheckpoint()
        wrong = list(load(checked))
        if wrong:
            problems = [] if files else wrong
        elif config.checkpoint.load is not None:
            values, problems = _settings(config, saved, set_by_user, task=task)
    if values:
        return FromCheckpoint(values)
    sizes = ("model.", "tokenizer.", "data.seq_length")
    unknown = frozenset(name for name in by_name() if name.startswith(sizes) and name not in chosen)
    return FromCheckpoint(problems=tuple(found_on_disk(problems)), unknown=unknown)


def _settings(
    config: RunSettings, saved: ReadSaved, set_by_user: frozenset[str], *, task: bool
) -> tuple[dict[str, Any], list[Problem]]:
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
    tokenizer = {f"tokenizer.{f.name}": getattr(held.tokenizer, f.name) for f in dataclasses.fields(held.tokenizer)}
    if not task and not set_by_user & (tokenizer.keys() - FREE_OF_TOKENIZER):  # a tokenizer comes whole from one place
        found |= tokenizer
    return {name: value for name, value in found.items() if value is not None or name.startswith("model.")}, []
