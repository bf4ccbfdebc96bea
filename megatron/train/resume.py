"""Where a run's state comes from, decided before anything is built, and said in its first line."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch.distributed as dist

from megatron.checkpoint.layout import MANIFEST, CheckpointError, find, newest_complete, read_config, read_state
from megatron.checkpoint.load import load
from megatron.config.compare import different_model
from megatron.config.errors import ConfigError, Problem
from megatron.config.options import say
from megatron.config.saved import from_json
from megatron.config.schema import CheckpointConfig, RunConfig
from megatron.mesh.mesh import Mesh
from megatron.optim.lr import Schedule
from megatron.train.run import Run, sample_counts
from megatron.train.state import TrainState

# Settings that are told as fields of the schedule.
SCHEDULED = ("lr", "min_lr", "weight_decay", "start_weight_decay", "end_weight_decay")
# Settings about this start of the run rather than about the run.
UNIMPORTANT = {"checkpoint", "log", "tokenizer", "layout"}


@dataclass(frozen=True)
class Source:
    """directory: the checkpoint, None for a fresh start. saved, state: the configuration and the counters in it.
    optimizer, progress: whether these come from it too, beside the weights. lines: what to tell."""

    directory: Path | None = None
    saved: RunConfig | None = None
    state: TrainState = field(default_factory=TrainState)
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
    return _from(directory, lines, optimizer=not (config.finetune or config.no_load_optim), progress=not config.finetune)


def _from(directory: Path, lines: list[str], *, optimizer: bool, progress: bool) -> Source:
    position = "optimizer, " if optimizer else ""
    position += "schedule and data position" if progress else ""
    rest = "only" if not position else f"with {position.rstrip(', ')}"
    lines.append(f"loading checkpoint {directory}: weights {rest}")
    state = TrainState()
    state.load_scalars(read_state(directory).get("train", {}))
    return Source(directory, from_json(read_config(directory)), state, optimizer, progress, tuple(lines))


def check_source(source: Source, config: RunConfig) -> None:
    """ConfigError with everything in which the checkpoint does not hold what the run asks of it."""
    if source.saved is None:
        return
    problems = different_model(source.saved.model, config.model, str(source.directory))
    if source.optimizer and source.saved.checkpoint.no_save_optim:
        rule = "holds no optimizer state, it was saved with --no-save-optim; start a new one with --no-load-optim"
        problems.append(Problem(f"the checkpoint {source.directory}", rule))
    elif source.optimizer and source.saved.optim.optimizer != config.optim.optimizer:
        rule = f"does not fit {source.directory}, which was made with {source.saved.optim.optimizer}"
        legal = f"{source.saved.optim.optimizer}, or --no-load-optim"
        problems.append(Problem(say("optim.optimizer", config.optim.optimizer), rule, legal))
    if problems:
        raise ConfigError(problems)


def choose_schedule(source: Source, config: RunConfig) -> Schedule:
    """A resumed run keeps the checkpoint's schedule, unless --override-opt_param-scheduler says otherwise."""
    if not source.state.schedule or not source.progress or config.optim.override_opt_param_scheduler:
        return Schedule.of(config.optim, config.batch)
    return Schedule(**source.state.schedule)


def differences(source: Source, config: RunConfig) -> Iterator[str]:
    """A table of the settings in which a resumed run differs from its checkpoint, with the value that counts."""
    if source.saved is None or not source.progress:
        return
    asked = asdict(Schedule.of(config.optim, config.batch))
    winner = "this run's" if config.optim.override_opt_param_scheduler else "the checkpoint's"
    for name, there in source.state.schedule.items():
        if there != asked[name]:
            yield f"  schedule, {name}: {there} in the checkpoint, {asked[name]} asked for; {winner} counts"
    samples = sample_counts(config)[0]
    if samples != source.state.training_samples:
        yield (
            f"  training samples: {source.state.training_samples} in the checkpoint, {samples} here; this run's counts, and "
            "the order of samples depends on it: samples that were seen can come again before their epoch ends"
        )
    for section in fields(config):
        if section.name in UNIMPORTANT:
            continue
        there, here = getattr(source.saved, section.name), getattr(config, section.name)
        for setting in fields(here):
            values = getattr(there, setting.name), getattr(here, setting.name)
            if values[0] != values[1] and not setting.name.startswith(SCHEDULED):
                yield f"  {section.name}.{setting.name}: {values[0]} in the checkpoint, {values[1]} here; this run's counts"


def agree(source: Source, mesh: Mesh) -> None:
    """CheckpointError on all ranks unless all start from the same checkpoint. Collective.

    Each rank has looked for itself; on a directory that is not shared, or that is seen late, they can see differently.
    """
    seen = None
    if source.directory is not None:
        manifest = (source.directory / MANIFEST).read_bytes()
        seen = f"{source.directory.name}, manifest {hashlib.sha256(manifest).hexdigest()[:16]}"
    if mesh.world.group is None:
        return
    all_seen: list[str | None] = [None] * mesh.world.size
    dist.all_gather_object(all_seen, seen, group=mesh.world.group)
    if len(set(all_seen)) > 1:
        views = "; ".join(f"rank {rank}: {view or 'nothing'}" for rank, view in enumerate(all_seen))
        raise CheckpointError(f"the ranks see different checkpoints: {views}. --save and --load must be on a shared disk")


def restore(source: Source, run: Run) -> None:
    """Fill the run from its source. Collective. CheckpointError when something does not fit."""
    agree(source, run.mesh)
    schedule, samples = run.state.schedule, sample_counts(run.config)[0]
    if source.directory is not None:
        load(source.directory, run.parts(optimizer=source.optimizer, state=source.progress), run.mesh)
    run.state.schedule, run.state.training_samples = schedule, samples
