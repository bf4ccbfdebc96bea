"""Find the checkpoint that a run starts from, compare its configuration with that of the run, and load it.

A checkpoint is checked twice. Before the process group forms, each rank alone checks file sizes and reads the small files, so
that a mistake in the command is reported at once. Then the ranks together verify every byte; if one is wrong, all ranks fall
back to the next older checkpoint.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch.distributed as dist

from megatron.checkpoint.agreement import run_on_all_ranks
from megatron.checkpoint.find import find_checkpoint
from megatron.checkpoint.layout import (
    CONFIG,
    DIRECTORY,
    MANIFEST,
    MAX_JSON_BYTES,
    STATE,
    CheckpointError,
    describe_other_iterations,
    holds_weights_alone,
    newest_complete,
    read_config,
    read_manifest,
    read_state,
)
from megatron.checkpoint.load import load, verify_on_all_ranks
from megatron.config.checkpoint import starts_fresh
from megatron.config.command_line.saved import from_json
from megatron.config.compare import head_differences, model_differences
from megatron.config.errors import ConfigError, Problem
from megatron.config.options import by_name, flag_text
from megatron.config.schema import CheckpointConfig, DataSettings, ModelConfig, RunConfig, RunSettings
from megatron.data.blend import parse_blend
from megatron.files.regular import read_bytes
from megatron.launch.job import Job
from megatron.mesh.mesh import Axis
from megatron.optim.lr import LRSchedule
from megatron.plan.size import MetaModel
from megatron.train.resumed_schedule import check_schedule, schedule_rows
from megatron.train.run import Run, sample_counts
from megatron.train.source import StateSource
from megatron.train.state import TrainState

# Prefixes of optimizer settings that the table of differences shows as fields of the schedule, and not a second time.
SCHEDULE_SETTINGS = (
    "lr", "min_lr", "decoupled", "weight_decay", "start_weight_decay", "end_weight_decay", "override_opt", "use_checkpoint_opt",
)  # fmt: skip
# Sections of settings that do not affect the training, so they are not compared.
NOT_COMPARED = ("checkpoint", "log")
# The settings that decide which samples a training run sees, and in which order.
DATA_MIX = ("data_path", "train_data_path", "split", "dataloader_type")
MOCK = "--mock-data"
# All settings that the order of samples depends on, for an older checkpoint, which does not record the order itself.
ORDER_SETTINGS = frozenset({*(f"data.{name}" for name in DATA_MIX), "data.mock_data", "data.seq_length", "batch.seed"})
# Fields of a saved schedule whose value must be one of the choices of an optimizer setting: the field, the setting.
STYLE_SETTINGS = MappingProxyType(
    {"style": "lr_decay_style", "annealing_style": "lr_wsd_decay_style", "decay_weights_style": "weight_decay_incr_style"}
)
# Prefixes of parameters that a model with a task's head may have in addition to those of a pretrained one.
HEAD_PARAMETERS = ("pooler.", "task_head.")
NO_DAMAGE: Mapping[Path, str] = MappingProxyType({})


def find_source(config: CheckpointConfig, damaged: Mapping[Path, str] = NO_DAMAGE) -> StateSource:
    """Find the checkpoint to start from: with --auto-resume the newest complete one in --save, else that of --load, if given.

    Args:
        config: the settings of checkpoints.
        damaged: checkpoints that are known to be damaged, each with the reason; they are not used.

    Raises:
        CheckpointError: an expected checkpoint is missing or damaged. Training does not start from random weights instead,
            unless no checkpoint was ever finished in --save.
    """
    lines: list[str] = []
    if config.auto_resume and config.save is not None:
        root = Path(config.save)
        newest = newest_complete(root, damaged)
        lines += newest.lines
        # Imported weights in --save, which --load --finetune names, are not a run to resume.
        imported = newest.path is not None and config.finetune and config.load is not None and holds_weights_alone(newest.path)
        if newest.path is not None and not imported:
            return _source_from_checkpoint(newest.path, lines, optimizer=True, progress=True)
        if not newest.empty and not imported:
            advice = "to start fresh, give another --save, or move away what is there"
            raise CheckpointError(f"--auto-resume: no checkpoint in {root} is complete: {'; '.join(newest.skipped)}; {advice}")
        lines.append(f"nothing to resume in {config.save}")
    if config.load is None or starts_fresh(config):
        if config.load is not None and not config.auto_resume:
            lines.append(f"nothing to load in {config.load} yet, which is also --save")
        fresh = "starting fresh: weights and sample order from the seed, a new optimizer, data from the first sample"
        return StateSource(lines=(*lines, fresh))
    directory = _find_load(config, lines, damaged)
    with_optimizer = not (config.finetune or config.no_load_optim)
    return _source_from_checkpoint(directory, lines, optimizer=with_optimizer, progress=not config.finetune)


def _find_load(config: CheckpointConfig, lines: list[str], damaged: Mapping[Path, str]) -> Path:
    """Return the checkpoint that --load names, or the newest complete one in the directory that it names."""
    path = Path(config.load or ".")
    names_one = (path / MANIFEST).is_file() or DIRECTORY.fullmatch(path.name) is not None
    if config.load_iteration is not None or names_one or not path.is_dir():
        directory = find_checkpoint(path, config.load_iteration)
        if directory in damaged:
            raise CheckpointError(
                f"{damaged[directory]}. {describe_other_iterations(directory)}; choose one with --load-iteration"
            )
        return directory
    newest = newest_complete(path, damaged)
    if newest.path is None:
        why = "; ".join(newest.skipped) or "there is no iter_ directory"
        raise CheckpointError(f"{path}: there is no complete checkpoint: {why}")
    lines += newest.lines
    return newest.path


def _source_from_checkpoint(directory: Path, lines: list[str], *, optimizer: bool, progress: bool) -> StateSource:
    """Read the configuration and the counters of a checkpoint; the last line tells the user what will be loaded."""
    state_parts = "optimizer, " if optimizer else ""
    state_parts += "schedule and data position" if progress else ""
    more = "only" if not state_parts else f"with {state_parts.rstrip(', ')}"
    lines.append(f"loading checkpoint {directory}: weights {more}")
    state = _parse_counters(read_state(directory).get("train", {}), directory / STATE)
    try:
        saved = from_json(read_config(directory))
    except ConfigError as error:
        raise CheckpointError(f"{directory / CONFIG}: {error}") from error
    return StateSource(directory, saved, state, optimizer, progress, tuple(lines))


def _parse_counters(values: Mapping[str, Any], path: Path) -> TrainState:
    """Return the counters of a checkpoint. CheckpointError for a value that a run never saves."""
    state = TrainState()
    for each in fields(state):
        if each.name in values and not _is_valid(values[each.name], getattr(state, each.name)):
            raise CheckpointError(f"{path}: train.{each.name}: {str(values[each.name])[:40]!r} is not a value that a run saves")
    # Without the scaler, whose values are only checked here: `load` gives them to the scaler of the run.
    state.load_scalars({name: value for name, value in values.items() if name != "scaler"})
    if state.schedule:
        types = {f.name: f.type for f in fields(LRSchedule)}
        for name, value in state.schedule.items():
            if name not in types or not _is_valid(value, {"int": 0, "float": 0.0, "str": "", "bool": False}[str(types[name])]):
                raise CheckpointError(
                    f"{path}: train.schedule.{name}: {str(value)[:40]!r} is not a field of a schedule, or not of its type"
                )
            choices = by_name()[f"optim.{STYLE_SETTINGS[name]}"].choices or () if name in STYLE_SETTINGS else None
            if choices is not None and value not in choices:
                raise CheckpointError(f"{path}: train.schedule.{name}: {value[:40]!r} is none of {', '.join(choices)}")
        if missing := {f.name for f in fields(LRSchedule) if f.default is MISSING} - state.schedule.keys():
            raise CheckpointError(f"{path}: train.schedule: {min(missing)} is missing")
    for name, value in values.get("scaler", {}).items():
        if not _is_valid(value, 0.0):
            raise CheckpointError(f"{path}: train.scaler.{name}: {str(value)[:40]!r} is not a value that a run saves")
    return state


def _is_valid(value: object, default: object) -> bool:
    """Return whether a JSON value has the type of a field's default. Floats must be finite, integers not negative."""
    if isinstance(default, bool):  # before int, since bool is a subclass of it
        return isinstance(value, bool)
    if isinstance(default, int | float):
        is_int = isinstance(value, int) and not isinstance(value, bool)
        is_number = is_int or (isinstance(default, float) and isinstance(value, float))
        if isinstance(default, float):
            return is_number and -math.inf < value < math.inf  # type: ignore[operator]
        return is_number and 0 <= value < 1 << 63  # type: ignore[operator]  # fits an int64
    if isinstance(default, str):
        return isinstance(value, str)
    return isinstance(value, dict) if not isinstance(default, list | tuple) else isinstance(value, list)


def check_source(source: StateSource, config: RunConfig) -> None:
    """Check that the checkpoint fits the run: model, optimizer and data.

    Raises:
        ConfigError: with a problem for each mismatch.
    """
    if source.saved is None:
        return
    problems = [*weights_only_problems(source), *model_differences(source.saved.model, config.model, str(source.directory))]
    new_head = not source.progress and not config.eval.skip_train
    problems += head_differences(source.saved.model, config.model, str(source.directory), may_add_head=new_head)
    if source.optimizer and source.saved.checkpoint.no_save_optim:
        rule = "contains no optimizer state, since it was saved with --no-save-optim; start a new one with --no-load-optim"
        problems.append(Problem(f"the checkpoint {source.directory}", rule))
    elif source.optimizer and source.saved.optim.optimizer != config.optim.optimizer:
        rule = f"does not fit {source.directory}, which was made with {source.saved.optim.optimizer}"
        legal = f"{source.saved.optim.optimizer}, or --no-load-optim"
        problems.append(Problem(flag_text("optim.optimizer", config.optim.optimizer), rule, legal))
    if source.progress and not config.checkpoint.allow_data_change and not config.eval.skip_train:
        problems += _data_changes(source.saved.data, config.data, source.directory)
    if problems:
        raise ConfigError(problems)


def weights_only_problems(source: StateSource) -> Iterator[Problem]:
    """Yield a problem if a run would resume from a checkpoint that contains only weights, such as an imported one."""
    if source.directory is not None and (source.optimizer or source.progress) and holds_weights_alone(source.directory):
        rule = "contains weights only, as an import does: no optimizer state, no iteration and no position in the data"
        yield Problem(f"the checkpoint {source.directory}", rule, f"--load {source.directory.parent} --finetune")


def _data_changes(saved: DataSettings, requested: DataSettings, directory: Path | None) -> Iterator[Problem]:
    """Yield a problem for each setting that makes the training data differ from the checkpoint's."""
    for name in DATA_MIX:
        old, new = _data_setting(saved, name), _data_setting(requested, name)
        if _normalize(old) != _normalize(new):
            old_text = " ".join(old) if isinstance(old, tuple) else old
            rule = f"changes the training data of {directory}, which was trained on `{old_text or 'no ' + name}`"
            legal = f"{old_text or 'leave it out'}; --allow-data-change continues at the same position of the new order"
            yield Problem(f"`{new}`" if new == MOCK else flag_text(f"data.{name}", new), rule, legal)


def _data_setting(data: DataSettings, name: str) -> str | tuple[str, ...]:
    """Return a data setting; for mock data, return `--mock-data` in place of --data-path."""
    value: str | tuple[str, ...] = getattr(data, name)
    return MOCK if data.mock_data and name == "data_path" else value


def _normalize(value: str | tuple[str, ...]) -> object:
    """Return a data setting in a form that can be compared: prefixes as absolute paths, weights as numbers."""
    if isinstance(value, str) or not value:
        return value
    prefixes, weights = parse_blend(value)
    return [os.path.abspath(p.removesuffix(".bin").removesuffix(".idx")) for p in prefixes], weights


def difference_table(source: StateSource, config: RunConfig, other_order: bool | None = None) -> Iterator[str]:
    """Yield the lines of a table of the settings in which a resumed run differs from its checkpoint.

    Args:
        source: the checkpoint.
        config: the resolved configuration.
        other_order: whether the order of training samples differs now; None if the checkpoint does not record the order.
    """
    if source.saved is None or not source.progress:
        return
    rows = [*schedule_rows(source, config), *_setting_rows(source.saved, config)]
    samples = sample_counts(config)[0]
    if samples != source.state.training_samples:
        rows.append(("training samples", source.state.training_samples, samples, "this run's"))
    if rows:
        yield "  differs from the checkpoint:"
        yield from _aligned([("setting", "in the checkpoint", "requested", "used"), *rows])
    if other_order or (other_order is None and any(row[0] in ORDER_SETTINGS for row in rows)):
        yield "  the order of samples differs: samples may be repeated before their epoch ends"


Row = tuple[str, object, object, str]  # setting, its value in the checkpoint, the requested value, and whose is used


def _setting_rows(saved: RunSettings, config: RunConfig) -> Iterator[Row]:
    """Yield a row for each setting that differs, except for those that the rows of the schedule show."""
    for section in fields(config):
        if section.name in NOT_COMPARED:
            continue
        old, new = getattr(saved, section.name), getattr(config, section.name)
        for setting in fields(new):
            values = getattr(old, setting.name), getattr(new, setting.name)
            if values[0] != values[1] and not setting.name.startswith(SCHEDULE_SETTINGS):
                yield f"{section.name}.{setting.name}", *values, "this run's"


def _aligned(rows: Iterable[Row]) -> Iterator[str]:
    """Yield the rows of a table as lines, with aligned columns."""
    cells = [tuple(" ".join(map(str, v)) or "none" if isinstance(v, tuple) else str(v) for v in row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        yield "  " + "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()


def verify_source(source: StateSource, config: RunConfig, job: Job) -> StateSource:
    """Verify every byte of the checkpoint, and fall back to the next older one while it is damaged. Collective.

    Call it before the run is built, since the source that is returned determines schedule and data position.

    Args:
        source: the source that this rank has found by itself.
        config: the resolved configuration.
        job: the job, whose ranks have joined.

    Returns:
        The source that all ranks start from.

    Raises:
        CheckpointError: on all ranks, if no complete checkpoint is left, or the one that --load names is damaged.
    """
    size = job.env.world_size
    group = dist.group.WORLD if size > 1 else None
    world = Axis("world", size, job.env.rank, tuple(range(size)), group)
    damaged: dict[Path, str] = {}
    while True:  # each iteration rules out one checkpoint
        require_same_checkpoint(source, world)
        if source.directory is None:
            return source
        try:
            verify_on_all_ranks(source.directory, world, job.watch)
            return replace(source, verified=True)
        except CheckpointError as error:  # raised on all ranks
            damaged[source.directory] = str(error)
        source = run_on_all_ranks(world, lambda: find_source(config.checkpoint, damaged))
        try:
            check_source(source, config)
            check_schedule(source, config)
        except ConfigError as error:
            raise CheckpointError(f"{'; '.join(source.lines)}; but it does not fit the command: {error}") from error


def require_same_checkpoint(source: StateSource, world: Axis) -> None:
    """Check that all ranks start from the same checkpoint. Collective.

    Each rank has searched by itself, and may have found other files: the directory may not be shared, or a file server may lag.

    Raises:
        CheckpointError: on all ranks, with the checkpoint that each rank has found.
    """
    if world.group is None:
        return
    found = None
    if source.directory is not None:
        try:
            digest = hashlib.sha256(read_bytes(source.directory / MANIFEST, MAX_JSON_BYTES)).hexdigest()[:16]
        except OSError as error:
            digest = f"that cannot be read: {error.strerror}"
        found = f"{source.directory.name}, manifest {digest}"
    all_found: list[str | None] = [None] * world.size
    dist.all_gather_object(all_found, found, group=world.group)
    if len(set(all_found)) > 1:
        views = "; ".join(f"rank {rank}: {name or 'none'}" for rank, name in enumerate(all_found))
        raise CheckpointError(f"the ranks see different checkpoints: {views}. --save and --load must be on a shared disk")


def restore(source: StateSource, run: Run) -> list[str]:
    """Load the run's weights and state from its source. Collective.

    Returns:
        The names of parameters that keep their initial values: those of a task's head, if the checkpoint lacks them.

    Raises:
        CheckpointError: the checkpoint does not fit the run.
    """
    require_same_checkpoint(source, run.mesh.world)
    schedule, samples = run.state.schedule, sample_counts(run.config)[0]
    new_parameters: list[str] = []
    if source.directory is not None:
        parts = run.parts(optimizer=source.optimizer, state=source.progress)
        model, saved = run.config.model, None if source.saved is None else source.saved.model
        other_head = saved is not None and saved.task_head != model.task_head
        if other_head:
            new_parameters = _new_parameters(source.directory, model)
        load(source.directory, parts, run.mesh, verified=source.verified, strict=not other_head)
    # Loading has overwritten both. The run keeps the schedule that `choose_schedule` returned, and its own number of samples.
    run.state.schedule, run.state.training_samples = schedule, samples
    return new_parameters


def _new_parameters(directory: Path, model: ModelConfig) -> list[str]:
    """Return the parameters of a model with a task's head that are not in the pretraining checkpoint.

    CheckpointError, on all ranks, if one that is not of the head is missing.
    """
    saved = read_manifest(directory).tensors
    missing = [p.name for p in MetaModel(model).parameters() if f"model.{p.name}" not in saved]
    if others := [name for name in missing if not name.startswith(HEAD_PARAMETERS)]:
        raise CheckpointError(f"{directory}: {len(others)} tensors are not in the checkpoint: {', '.join(others[:20])}")
    return missing
