"""The schedule of learning rate and weight decay that a run follows: the checkpoint's or the command line's, never by chance.

Both are counted in samples, so --train-iters, --train-samples and --global-batch-size change it as --lr does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from megatron.config.batch_size import global_batch_size_at
from megatron.config.errors import ConfigError, Problem
from megatron.config.options import by_name
from megatron.config.schema import BatchConfig, RunConfig
from megatron.optim.lr import Schedule
from megatron.train.source import Source
from megatron.train.state import TrainState

OVERRIDE, KEEP = (
    by_name()[f"optim.{name}"].flag for name in ("override_opt_param_scheduler", "use_checkpoint_opt_param_scheduler")
)


@dataclass(frozen=True)
class Difference:
    """A field of the schedule in which a command differs from the checkpoint that it resumes from."""

    field: str
    held: Any
    asked: Any


def differing(source: Source, config: RunConfig) -> list[Difference]:
    """Where the schedules differ, field by field; a field that has no effect in either is left out."""
    held, asked = source.state.schedule, asdict(Schedule.of(config.optim, config.batch))
    if not held or not source.progress:
        return []
    idle: set[str] = set()
    if held["style"] == asked["style"] == "constant":
        idle.add("floor")
    if held["decay_weights_style"] == asked["decay_weights_style"] == "constant":
        idle.add("decay_weights_from")
        idle |= {"decay"} if "floor" in idle else set()
    return [Difference(name, there, asked[name]) for name, there in held.items() if there != asked[name] and name not in idle]


def check_schedule(source: Source, config: RunConfig) -> None:
    """ConfigError where the schedules differ and the command does not say which one counts."""
    optim = config.optim
    if optim.override_opt_param_scheduler or optim.use_checkpoint_opt_param_scheduler or config.eval.skip_train:
        return
    legal = f"{OVERRIDE} follows the new schedule from here on, {KEEP} goes on with the checkpoint's"
    problems = [
        Problem(_setting(d.field, config), f"is {d.asked}; the schedule of {source.directory} has {d.held}", legal)
        for d in differing(source, config)
    ]
    if problems:
        raise ConfigError(problems)


def _setting(field: str, config: RunConfig) -> str:
    """A field of the schedule as the flags that decide it."""
    optim, batch = config.optim, config.batch
    size, unit = batch.global_batch_size, "iters" if batch.train_samples is None else "samples"
    names = {
        "peak": "`--lr`",
        "floor": "`--min-lr`",
        "style": "`--lr-decay-style`",
        "decay_weights_from": "`--start-weight-decay`",
        "decay_weights_to": "`--end-weight-decay`" if optim.weight_decay_incr_style != "constant" else "`--weight-decay`",
        "decay_weights_style": "`--weight-decay-incr-style`",
    }
    if field in names:
        return names[field]
    times = f" x `--global-batch-size {size}`" if unit == "iters" else ""
    decay = getattr(optim, f"lr_decay_{unit}")
    own = f"`--lr-decay-{unit} {decay}`{times}"
    if decay == getattr(batch, f"train_{unit}"):
        own = f"`--train-{unit} {decay}`{times}" if config.task.epochs is None else f"`--epochs {config.task.epochs}`"
    if field == "decay":
        return f"the length of the learning rate's decay in samples ({own})"
    warmup = f"`--lr-warmup-{unit} {getattr(optim, f'lr_warmup_{unit}')}`{times}"
    if optim.lr_warmup_fraction is not None:
        warmup = f"`--lr-warmup-fraction {optim.lr_warmup_fraction}` of the decay, {own}"
    return f"the length of the learning rate's warm-up in samples ({warmup})"


def choose_schedule(source: Source, config: RunConfig) -> Schedule:
    """A resumed run keeps the checkpoint's schedule, unless --override-opt_param-scheduler says otherwise."""
    if not source.state.schedule or not source.progress or config.optim.override_opt_param_scheduler:
        return Schedule.of(config.optim, config.batch)
    return Schedule(**source.state.schedule)


def schedule_rows(source: Source, config: RunConfig) -> Iterator[tuple[str, object, object, str]]:
    """The differences as rows of the table of a resumed run."""
    winner = "this run's" if config.optim.override_opt_param_scheduler else "the checkpoint's"
    for each in differing(source, config):
        yield f"schedule, {each.field}", each.held, each.asked, winner


def warning_of_rate_zero(schedule: Schedule, state: TrainState, batch: BatchConfig) -> str | None:
    """A line to overlook for nobody, where iterations that are still to come would train at a learning rate of 0.

    Args:
        schedule: that the run follows.
        state: where it stands.
        batch: of the resolved configuration.

    Returns:
        The line, None where all is well. Steps that may be skipped are not foreseen: they move the schedule later.
    """
    last = batch.train_iters or 0
    first = _first_at_rate_zero(schedule, state, batch)
    if first is None or first > last:
        return None
    which = f"iterations {first} to {last} lie" if first < last else f"iteration {last} lies"
    rule = f"{which} beyond the end of the learning-rate schedule, after {schedule.decay} samples, where --min-lr is 0"
    ways = f"give a longer --lr-decay-{'iters' if batch.train_samples is None else 'samples'} or a --min-lr"
    return f"***** WARNING: learning rate 0, nothing is learnt: {rule}; {ways}, on resume with {OVERRIDE} *****"


def _first_at_rate_zero(schedule: Schedule, state: TrainState, batch: BatchConfig) -> int | None:
    """The first iteration from now on whose update comes after the schedule's end, at a rate of 0."""
    # Where the rate is 0 at all it stays so. A first update of a warm-up has rate 0 as well, which is as it should be.
    end = next((samples for samples in (schedule.decay, schedule.decay + 1) if schedule.rate(samples) == 0.0), None)
    if end is None or schedule.peak == 0.0 or end <= schedule.warmup:
        return None
    iteration, consumed, left = state.iteration, state.consumed_samples, end - state.scheduled_samples
    ramp = batch.rampup_batch_size[2] if batch.rampup_batch_size else -1
    while left > 0 and consumed <= ramp:
        size = global_batch_size_at(batch, consumed)
        iteration, consumed, left = iteration + 1, consumed + size, left - size
    return iteration + 1 + max(0, -(-left // (batch.global_batch_size or 1)))
