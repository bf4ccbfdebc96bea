"""The rules of what changes over a run: the warm-up's begin, the phases of WSD, and a schedule of batch sizes."""

from __future__ import annotations

from collections.abc import Iterator

from megatron.config.batch_size import parse_steps, stretches
from megatron.config.case import Case, Rule
from megatron.config.errors import Problem
from megatron.config.options import by_name, flag_text
from megatron.config.resolve import data_parallel_size
from megatron.config.schema import BatchConfig, OptimConfig, RunConfig

STEPS = "batch.step_batch_size_schedule"


def unit_of(batch: BatchConfig) -> str:
    """The unit of a run's length and of its learning rate's, as it stands in the flags' names."""
    return "iters" if batch.train_samples is None else "samples"


def wsd_phases(c: Case) -> Iterator[Problem]:
    """WSD says how long its decay is, and that fits between warm-up and end."""
    unit = unit_of(c.typed.batch)
    own, decay = f"optim.lr_wsd_decay_{unit}", c[f"optim.lr_decay_{unit}"]
    if c["optim.lr_decay_style"] != "WSD" or own in c.bad:
        return
    if c[own] is None:
        other = "optim.lr_wsd_decay_samples" if unit == "iters" else "optim.lr_wsd_decay_iters"
        if c[other] is None or c["task.task"] is not None:  # else it is said that the two units do not mix
            yield Problem(
                c.flag_text("optim.lr_decay_style"), f"needs `{by_name()[own].flag}`, the length of the decay at its end"
            )
        return
    if decay is None or {f"optim.lr_decay_{unit}", f"optim.lr_warmup_{unit}", "optim.lr_warmup_fraction"} & c.bad:
        return
    fraction, warm = c["optim.lr_warmup_fraction"], c[f"optim.lr_warmup_{unit}"]
    warm = warm if fraction is None else int(fraction * decay)
    if warm < decay < warm + c[own]:
        rule = f"is longer than what the warm-up of {warm} leaves of `--lr-decay-{unit} {decay}`"
        yield Problem(c.flag_text(own), rule, f"1 to {decay - warm}")


def warm_up_begin(c: Case) -> Iterator[Problem]:
    """A warm-up goes up."""
    lr, begin = c["optim.lr"], c["optim.lr_warmup_init"]
    if lr is not None and begin > lr:
        yield Problem(c.flag_text("optim.lr_warmup_init"), f"is greater than `--lr {lr}`, where the warm-up ends", f"0 to {lr}")


def decoupled_rates(c: Case) -> Iterator[Problem]:
    """The floor of word embedding and output layer is not above their peak."""
    peak, name = c["optim.decoupled_lr"], "optim.min_lr" if c["optim.decoupled_min_lr"] is None else "optim.decoupled_min_lr"
    if peak is not None and c[name] > peak:
        yield Problem(c.flag_text(name), f"is greater than `--decoupled-lr {peak}`", f"0 to {peak}, also by --decoupled-min-lr")


def step_sizes(c: Case) -> Iterator[Problem]:
    """A schedule of batch sizes is alone in saying them, and each makes whole micro-batches.

    A run that goes on with more ranks may have smaller sizes behind it; see `uneven_ahead`.
    """
    seq_length, micro = c["data.seq_length"], c["batch.micro_batch_size"]
    if not c[STEPS] or STEPS in c.bad:
        return
    what = c.flag_text(STEPS)
    for other in ("batch.rampup_batch_size", "batch.decrease_batch_size_if_needed"):
        if c[other]:
            yield Problem(c.flag_text(STEPS, other), "exclude each other; give one of them")
            return
    if seq_length is None:  # which is said elsewhere
        return
    try:
        sizes = [size for _, size in parse_steps(c[STEPS], seq_length)]
    except ValueError as error:
        yield Problem(what, str(error))
        return
    size = c.typed.batch.global_batch_size
    if size is not None and size != sizes[-1]:
        rule = "exclude each other: the schedule says every size, and its last one is the global batch size"
        yield Problem(f"{what} and `--global-batch-size {size}`", rule)
    elif micro and c.dp and c["checkpoint.load"] is None and not c["checkpoint.auto_resume"]:
        yield from uneven_sizes(what, sizes, micro, c.dp)


def uneven_sizes(what: str, sizes: list[int], micro: int, dp: int) -> Iterator[Problem]:
    """A problem where some of these global batch sizes are no whole micro-batches of each rank."""
    if uneven := [size for size in sizes if size % (micro * dp)]:
        shown = ", ".join(map(str, uneven[:4])) + (", ..." if len(uneven) > 4 else "")
        rule = f"has the sizes {shown}, not divisible by `--micro-batch-size {micro}` x {dp} data-parallel ranks"
        yield Problem(what, rule, f"multiples of {micro * dp}")


def uneven_ahead(config: RunConfig, world_size: int, consumed: int) -> list[Problem]:
    """The problem of the sizes that a resolved run still has before it after `consumed` samples, where there is one."""
    batch, dp = config.batch, data_parallel_size(config.layout, world_size)
    if not batch.step_batch_size_schedule or config.eval.skip_train:
        return []
    sizes = [size for _, size in stretches(batch, consumed)]
    what = flag_text("batch.step_batch_size_schedule", batch.step_batch_size_schedule)
    return list(uneven_sizes(what, sizes, batch.micro_batch_size or 1, dp or 1))


def batch_remarks(batch: BatchConfig) -> list[str]:
    """That a resolved run's batches had to be smaller than what was asked for."""
    if batch.global_batch_size is None or not (rest := batch.global_batch_size % batch.batch_multiple):
        return []
    full = batch.global_batch_size
    return [f"the global batch has {full - rest} samples, not {full}: the ranks share multiples of {batch.batch_multiple}"]


def schedule_remarks(typed: OptimConfig, resolved: OptimConfig) -> list[str]:
    """What was said of the learning rate and has no effect."""
    notes, defaults = [], OptimConfig()
    names = ("lr_wsd_decay_style", "lr_wsd_decay_iters", "lr_wsd_decay_samples")
    given = [by_name()[f"optim.{name}"].flag for name in names if getattr(typed, name) != getattr(defaults, name)]
    if given and resolved.lr_decay_style != "WSD":
        verb = "changes" if len(given) == 1 else "change"
        notes.append(f"{' and '.join(given)} {verb} nothing: --lr-decay-style is {resolved.lr_decay_style}, not WSD")
    warmed = resolved.lr_warmup_iters or resolved.lr_warmup_samples or resolved.lr_warmup_fraction
    if typed.lr_warmup_init and not warmed:
        notes.append("--lr-warmup-init changes nothing: there is no warm-up")
    return notes


SCHEDULE_RULES: tuple[Rule, ...] = (wsd_phases, warm_up_begin, decoupled_rates)  # of every run that trains
