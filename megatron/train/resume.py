"""Where a run's state comes from, decided before anything is built, and said in its first line."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

from megatron.checkpoint.layout import find, newest_complete, read_config
from megatron.checkpoint.load import load
from megatron.config.compare import different_model
from megatron.config.errors import ConfigError
from megatron.config.saved import from_json
from megatron.config.schema import CheckpointConfig, RunConfig
from megatron.optim.lr import Schedule
from megatron.train.run import Run

# Settings about this start of the run rather than about the run.
UNIMPORTANT = {"checkpoint", "log", "tokenizer", "layout"}


@dataclass(frozen=True)
class Source:
    """directory: the checkpoint, None for a fresh start. saved: the configuration in it. optimizer, progress: whether
    these come from it too, beside the weights. lines: what to tell."""

    directory: Path | None = None
    saved: RunConfig | None = None
    optimizer: bool = False
    progress: bool = False
    lines: tuple[str, ...] = ()


def find_source(config: CheckpointConfig) -> Source:
    """The checkpoint to start from. CheckpointError when --load names none; never random weights by accident."""
    lines: list[str] = []
    if config.auto_resume and config.save is not None:
        newest = newest_complete(Path(config.save)) if Path(config.save).is_dir() else None
        lines += [f"passed over: {line}" for line in (newest.skipped if newest else ())]
        if newest is not None and newest.path is not None:
            return _from(newest.path, lines, optimizer=True, progress=True)
        lines.append(f"nothing to resume in {config.save}")
    if config.load is None:
        fresh = "starting fresh: weights and sample order from the seed, a new optimizer, data from the first sample"
        return Source(lines=(*lines, fresh))
    directory = find(Path(config.load), config.load_iteration)
    return _from(
        directory, lines, optimizer=not (config.finetune or config.no_load_optim), progress=not config.finetune
    )


def _from(directory: Path, lines: list[str], *, optimizer: bool, progress: bool) -> Source:
    position = "optimizer, " if optimizer else ""
    position += "schedule and data position" if progress else ""
    rest = "only" if not position else f"with {position.rstrip(', ')}"
    lines.append(f"loading checkpoint {directory}: weights {rest}")
    return Source(directory, from_json(read_config(directory)), optimizer, progress, tuple(lines))


def check_model(source: Source, config: RunConfig) -> None:
    """ConfigError with every setting in which the checkpoint holds another model than the run asks for."""
    if source.saved is None:
        return
    problems = different_model(source.saved.model, config.model, str(source.directory))
    if problems:
        raise ConfigError(problems)


def choose_schedule(source: Source, config: RunConfig) -> Schedule:
    """A resumed run keeps the checkpoint's schedule, unless --override-opt_param-scheduler says otherwise."""
    if source.saved is None or not source.progress or config.optim.override_opt_param_scheduler:
        return Schedule.of(config.optim, config.batch)
    return Schedule.of(source.saved.optim, source.saved.batch)


def differences(source: Source, config: RunConfig) -> Iterator[str]:
    """A table of the settings in which a resumed run differs from its checkpoint, with the value that counts."""
    if source.saved is None or not source.progress:
        return
    old, new = choose_schedule(source, config), Schedule.of(config.optim, config.batch)
    for field in fields(Schedule):
        there, here = getattr(source_schedule(source), field.name), getattr(new, field.name)
        if there != here:
            winner = "the checkpoint's" if getattr(old, field.name) == there else "this run's"
            yield f"  schedule, {field.name}: {there} in the checkpoint, {here} asked for; {winner} counts"
    for section in fields(config):
        if section.name in UNIMPORTANT:
            continue
        there, here = getattr(source.saved, section.name), getattr(config, section.name)
        for field in fields(here):
            values = getattr(there, field.name), getattr(here, field.name)
            if values[0] != values[1] and not field.name.startswith(("lr", "min_lr")):
                yield f"  {section.name}.{field.name}: {values[0]} in the checkpoint, {values[1]} here; this run's counts"


def source_schedule(source: Source) -> Schedule:
    """The schedule that the checkpoint's run followed. ValueError for a fresh start."""
    if source.saved is None:
        raise ValueError("a fresh start has no saved schedule")
    return Schedule.of(source.saved.optim, source.saved.batch)


def restore(source: Source, run: Run) -> None:
    """Fill the run from its source. Collective. CheckpointError when something does not fit."""
    if source.directory is not None:
        load(source.directory, run.parts(optimizer=source.optimizer, state=source.progress), run.mesh)
