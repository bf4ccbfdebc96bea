"""Choose the schedule of learning rate and weight decay of a resumed run: the checkpoint's or the command line's.

Schedules are counted in samples, so --train-iters, --train-samples and --global-batch-size change them, as --lr does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from megatron.config.batch import batch_size_phases
from megatron.config.errors import ConfigError, Problem
from megatron.config.optim import length_unit
from megatron.config.options import by_name
from megatron.config.rules import divisible_remaining_sizes
from megatron.config.schema import BatchConfig, RunConfig
from megatron.optim.lr import LRSchedule
from megatron.train.source import StateSource
from megatron.train.state import TrainState

OVERRIDE_FLAG, KEEP_FLAG = (
    by_name()[f"optim.{name}"].flag for name in ("override_opt_param_scheduler", "use_checkpoint_opt_param_scheduler")
)


@dataclass(frozen=True)
class ScheduleDifference:
    """A field of the schedule that has another value in the command than in the checkpoint to resume from.

    Attributes:
        field: name of the field of `LRSchedule`.
        saved: its value in the checkpoint.
        requested: its value according to the command.
    """

    field: str
    saved: Any
    requested: Any


def schedule_differences(source: StateSource, config: RunConfig) -> list[ScheduleDifference]:
    """Return the fields in which the schedules differ; a field that has no effect in both is left out."""
    if not source.state.schedule or not source.progress:
        return []
    saved = asdict(LRSchedule.from_saved(source.state.schedule))
    requested = asdict(LRSchedule.from_config(config.optim, config.batch))
    unused: set[str] = set()  # fields without an effect in either schedule
    if saved["style"] == requested["style"] == "constant":
        unused |= {"floor", "decay", "decoupled_floor"}
    if saved["decoupled"] != requested["decoupled"]:  # only this difference is reported
        unused |= {"decoupled_peak", "decoupled_floor"}
    if saved["decay_weights_style"] == requested["decay_weights_style"] == "constant":
        unused |= {"decay_weights_from", "decay_weights_over"}
    if "WSD" not in (saved["style"], requested["style"]):
        unused |= {"annealing", "annealing_style"}
    if saved["warmup"] == requested["warmup"] == 0:
        unused.add("initial")
    return [
        ScheduleDifference(name, value, requested[name])
        for name, value in saved.items()
        if value != requested[name] and name not in unused
    ]


def check_schedule(source: StateSource, config: RunConfig) -> None:
    """Check that the schedules agree, or that a flag says which one to use.

    Raises:
        ConfigError: with a problem for each field that differs.
    """
    optim = config.optim
    if optim.override_opt_param_scheduler or optim.use_checkpoint_opt_param_scheduler or config.eval.skip_train:
        return
    legal = f"{OVERRIDE_FLAG} uses the new schedule from here on, {KEEP_FLAG} keeps that of the checkpoint"
    problems = [
        Problem(_describe_field(d.field, config), f"is {d.requested}; the schedule of {source.directory} has {d.saved}", legal)
        for d in schedule_differences(source, config)
    ]
    if problems:
        raise ConfigError(problems)


def _describe_field(field: str, config: RunConfig) -> str:
    """Return the flags that determine a field of the schedule, for a message."""
    end = "end-" if config.optim.weight_decay_incr_style != "constant" else ""
    names = {
        "peak": "`--lr`",
        "floor": "`--min-lr`",
        "style": "`--lr-decay-style`",
        "initial": "`--lr-warmup-init`",
        "decoupled": "a separate learning rate for word embedding and output layer (`--decoupled-lr`)",
        "decoupled_peak": "`--decoupled-lr`",
        "decoupled_floor": "`--decoupled-min-lr`",
        "annealing_style": "`--lr-wsd-decay-style`",
        "decay_weights_from": "`--start-weight-decay`",
        "decay_weights_to": f"`--{end}weight-decay`",
        "decay_weights_style": "`--weight-decay-incr-style`",
    }
    return names.get(field) or _describe_length(field, config)


def _describe_length(field: str, config: RunConfig) -> str:
    """Return the flags that determine a length of the schedule, for a message."""
    optim, batch, unit = config.optim, config.batch, length_unit(config.batch)
    sizes = f"--global-batch-size {batch.global_batch_size}"
    if batch.step_batch_size_schedule:
        sizes = f"--step-batch-size-schedule {' '.join(batch.step_batch_size_schedule)}"
    batch_factor = f" x `{sizes}`" if unit == "iters" else ""
    run_length = f"`--train-{unit} {getattr(batch, f'train_{unit}')}`{batch_factor}"
    if config.task.epochs is not None:
        run_length = f"`--epochs {config.task.epochs}`"
    if field == "decay_weights_over":
        return f"the length of the change of weight decay in samples ({run_length})"
    decay = getattr(optim, f"lr_decay_{unit}")
    decay_length = run_length if decay == getattr(batch, f"train_{unit}") else f"`--lr-decay-{unit} {decay}`{batch_factor}"
    if field == "decay":
        return f"the length of the learning-rate decay in samples ({decay_length})"
    if field == "annealing":
        wsd = f"`--lr-wsd-decay-{unit} {getattr(optim, f'lr_wsd_decay_{unit}')}`{batch_factor}"
        return f"the length of the final decay (WSD) in samples ({wsd})"
    warmup = f"`--lr-warmup-{unit} {getattr(optim, f'lr_warmup_{unit}')}`{batch_factor}"
    if optim.lr_warmup_fraction is not None:
        warmup = f"`--lr-warmup-fraction {optim.lr_warmup_fraction}` of the decay, {decay_length}"
    return f"the length of the learning-rate warm-up in samples ({warmup})"


def check_batch_sizes(source: StateSource, config: RunConfig, world_size: int) -> None:
    """Check that the ranks can share each batch size of --step-batch-size-schedule that is still to come.

    The sizes before the position of a resumed run are not checked, since they are not used again.

    Args:
        source: contains the position that the run resumes from.
        config: the resolved configuration.
        world_size: number of ranks.

    Raises:
        ConfigError: a batch size cannot be divided into whole micro-batches for all ranks.
    """
    if problems := divisible_remaining_sizes(config, world_size, source.state.consumed_samples if source.progress else 0):
        raise ConfigError(problems)


def choose_schedule(source: StateSource, config: RunConfig) -> LRSchedule:
    """Return the run's schedule: a resumed run keeps that of the checkpoint, unless --override-opt_param-scheduler is given."""
    if not source.state.schedule or not source.progress or config.optim.override_opt_param_scheduler:
        return LRSchedule.from_config(config.optim, config.batch)
    return LRSchedule.from_saved(source.state.schedule)


def schedule_rows(source: StateSource, config: RunConfig) -> Iterator[tuple[str, object, object, str]]:
    """Yield the differences as rows of the table that a resumed run prints: setting, saved, requested, and which is used."""
    used = "this run's" if config.optim.override_opt_param_scheduler else "the checkpoint's"
    for each in schedule_differences(source, config):
        yield f"schedule, {each.field}", each.saved, each.requested, used


def zero_rate_warning(schedule: LRSchedule, state: TrainState, batch: BatchConfig) -> str | None:
    """Return a warning if remaining iterations would train at a learning rate of 0.

    Args:
        schedule: the schedule of the run.
        state: the counters at the position of the run.
        batch: the batch settings of the resolved configuration.

    Returns:
        The warning; None if there is no such iteration. Skipped steps, which delay the schedule, are not foreseen.
    """
    last = batch.iterations
    first = _first_at_rate_zero(schedule, state, batch)
    if first is None or first > last:
        return None
    iterations = f"iterations {first} to {last} lie" if first < last else f"iteration {last} lies"
    rule = f"{iterations} beyond the end of the learning-rate schedule, after {schedule.decay} samples, where --min-lr is 0"
    advice = f"give a longer --lr-decay-{length_unit(batch)} or a --min-lr"
    return f"***** WARNING: learning rate 0, nothing is learnt: {rule}; {advice}, on resume with {OVERRIDE_FLAG} *****"


def _first_at_rate_zero(schedule: LRSchedule, state: TrainState, batch: BatchConfig) -> int | None:
    """Return the first remaining iteration that trains at rate 0 after the end of the schedule; None if none does."""
    # After the decay the rate is constant. (The rate of 0 at the start of a warm-up is intended.)
    end = next((samples for samples in (schedule.decay, schedule.decay + 1) if schedule.rate(samples) == 0.0), None)
    if end is None or schedule.peak == 0.0 or end <= schedule.warmup:
        return None
    iteration, samples_left = state.iteration, end - state.scheduled_samples
    for steps, size in batch_size_phases(batch, state.consumed_samples):
        needed = max(0, -(-samples_left // size))  # number of steps of this size, rounded up
        if steps is None or needed <= steps:
            return iteration + needed + 1
        iteration, samples_left = iteration + steps, samples_left - steps * size
    return None
