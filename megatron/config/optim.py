"""Settings of the optimizer and of the learning-rate schedule."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from importlib.util import find_spec

from megatron.config.batch import BatchSettings
from megatron.config.check import ConfigCheck, Rules, exclusive, missing, needs
from megatron.config.errors import Problem
from megatron.config.optimizers import ADAMW, OPTIMIZERS, update_rules
from megatron.config.option import FROM_0_BELOW_1, NOT_NEGATIVE, POSITIVE, option

KERNEL = "optim.adam_kernel"
OPTIMIZER = "optim.optimizer"


@dataclass(frozen=True)
class OptimSettings:
    """Optimizer and learning-rate schedule."""

    optimizer: str = option("adam", "adam is AdamW, with decoupled decay", choices=tuple(OPTIMIZERS))
    lr: float | None = option(None, "peak learning rate", legal=NOT_NEGATIVE)
    min_lr: float = option(0.0, "floor of the learning rate", legal=NOT_NEGATIVE)
    decoupled_lr: float | None = option(
        None, "peak learning rate of word embedding and output layer; default --lr", legal=NOT_NEGATIVE
    )
    decoupled_min_lr: float | None = option(None, "floor of --decoupled-lr; default --min-lr", legal=NOT_NEGATIVE)
    lr_decay_style: str = option(
        "linear",
        "shape after warm-up; WSD: at --lr until a decay at the end (warm-up, stable, decay; arXiv 2404.06395)",
        choices=("constant", "linear", "cosine", "inverse-square-root", "WSD"),
    )
    lr_wsd_decay_style: str = option(
        "exponential", "shape of the decay of WSD", choices=("exponential", "linear", "cosine", "minus_sqrt")
    )
    lr_wsd_decay_iters: int | None = option(
        None, "of WSD: steps of the decay, the last ones of --lr-decay-iters", legal=POSITIVE
    )
    lr_wsd_decay_samples: int | None = option(
        None, "of WSD: samples of the decay, the last ones of --lr-decay-samples", legal=POSITIVE
    )
    lr_decay_iters: int | None = option(None, "steps until --min-lr; default --train-iters", legal=POSITIVE)
    lr_decay_samples: int | None = option(None, "samples until --min-lr; default --train-samples", legal=POSITIVE)
    lr_warmup_fraction: float | None = option(None, "share of the decay length that is warm-up", legal=FROM_0_BELOW_1)
    lr_warmup_iters: int = option(0, "steps of linear warm-up", legal=NOT_NEGATIVE)
    lr_warmup_samples: int = option(0, "samples of linear warm-up", legal=NOT_NEGATIVE)
    lr_warmup_init: float = option(0.0, "learning rate that the warm-up begins with", legal=NOT_NEGATIVE)
    weight_decay: float = option(
        0.01, "of matrices, not of biases and norms; decoupled with adam, part of the gradient with sgd", legal=NOT_NEGATIVE
    )
    start_weight_decay: float | None = option(
        None, "weight decay at the start, with a --weight-decay-incr-style", legal=NOT_NEGATIVE
    )
    end_weight_decay: float | None = option(
        None, "weight decay at the end, with a --weight-decay-incr-style", legal=NOT_NEGATIVE
    )
    weight_decay_incr_style: str = option(
        "constant", "shape of the weight decay over time", choices=("constant", "linear", "cosine")
    )
    clip_grad: float = option(1.0, "largest global gradient norm; 0 turns clipping off", legal=NOT_NEGATIVE)
    adam_beta1: float = option(0.9, "decay of the first moment", legal=FROM_0_BELOW_1)
    adam_beta2: float = option(0.999, "decay of the second moment", legal=FROM_0_BELOW_1)
    adam_eps: float = option(1e-8, "added to the root of the second moment", legal=POSITIVE)
    adam_kernel: str = option(
        "fused", "whose AdamW: torch's fused or foreach one, or apex's FusedAdam", choices=("fused", "foreach", "apex")
    )
    sgd_momentum: float = option(0.9, "momentum of sgd", legal=FROM_0_BELOW_1)
    override_opt_param_scheduler: bool = option(
        False,
        "on resume take the schedule of learning rate and weight decay from the command line; where it differs from the "
        "checkpoint's, one of the two flags must be given",
        aliases=("--override-lr-scheduler",),
        flag="--override-opt_param-scheduler",
    )
    use_checkpoint_opt_param_scheduler: bool = option(
        False,
        "on resume take the schedule from the checkpoint, whatever the command line says",
        aliases=("--use-checkpoint-lr-scheduler",),
        flag="--use-checkpoint-opt_param-scheduler",
    )
    on_nonfinite: str = option("skip", "what a NaN or Inf gradient does", choices=("skip", "abort"))
    max_consecutive_skips: int = option(50, "stop after this many skipped steps in a row", legal=POSITIVE)


@dataclass(frozen=True, kw_only=True)
class OptimConfig(OptimSettings):
    """Optimizer and learning-rate schedule, with the weight decay at both ends."""

    start_weight_decay: float = field()
    end_weight_decay: float = field()


def derive_optim(optim: OptimSettings, batch: BatchSettings) -> OptimSettings:
    """Fill in the lengths of the schedule and the ends of the weight decay. The values are Megatron-LM's."""
    decay_iters, decay_samples = optim.lr_decay_iters, optim.lr_decay_samples
    if batch.train_samples is not None:
        decay_samples = batch.train_samples if decay_samples is None else decay_samples
    elif decay_iters is None:
        decay_iters = batch.train_iters
    start, end = optim.start_weight_decay, optim.end_weight_decay
    if optim.weight_decay_incr_style == "constant":
        start = optim.weight_decay if start is None else start
        end = optim.weight_decay if end is None else end
    return replace(
        optim, lr_decay_iters=decay_iters, lr_decay_samples=decay_samples, start_weight_decay=start, end_weight_decay=end
    )


def length_unit(batch: BatchSettings) -> str:
    """The unit of a run's length and of its learning rate's, as it stands in the flags' names."""
    return "iters" if batch.train_samples is None else "samples"


def learning_rate_given(c: ConfigCheck) -> Iterator[Problem]:
    """A run that trains needs its learning rate."""
    if not c["eval.skip_train"]:
        yield from missing(c, ["optim.lr"])


def one_unit(c: ConfigCheck) -> Iterator[Problem]:
    """A run is measured in iterations or in samples, and so is its schedule."""
    typed = c.raw
    if c.iterations_chosen and typed.batch.train_samples is not None:
        yield Problem(c.flag_text("batch.train_iters", "batch.train_samples"), "exclude each other; give one of them")
        return
    families = {
        "batch.train_iters": ("optim.lr_decay_samples", "optim.lr_warmup_samples", "optim.lr_wsd_decay_samples"),
        "batch.train_samples": ("optim.lr_decay_iters", "optim.lr_warmup_iters", "optim.lr_wsd_decay_iters"),
    }
    unit = f"batch.train_{length_unit(typed.batch)}"
    for name in families[unit]:
        if c[unit] is not None and c.is_set(name):
            yield Problem(c.flag_text(name), f"cannot go with `{c.flag(unit)}`: iterations and samples do not mix")


def warm_up(c: ConfigCheck) -> Iterator[Problem]:
    """Warm-up is given once, and ends before the decay does."""
    explicit = [n for n in ("optim.lr_warmup_iters", "optim.lr_warmup_samples") if c.is_set(n) and n not in c.invalid]
    if c["optim.lr_warmup_fraction"] is not None and explicit:
        yield Problem(c.flag_text("optim.lr_warmup_fraction", *explicit), "exclude each other; give one of them")
    for unit in ("iters", "samples"):
        warm, decay = c[f"optim.lr_warmup_{unit}"], c[f"optim.lr_decay_{unit}"]
        if warm and decay and warm >= decay:
            rule = f"is not less than `--lr-decay-{unit} {decay}`, where the decay ends"
            yield Problem(c.flag_text(f"optim.lr_warmup_{unit}"), rule, f"0 to {decay - 1}")


def learning_rates(c: ConfigCheck) -> Iterator[Problem]:
    """The floor is not above the peak."""
    lr, low = c["optim.lr"], c["optim.min_lr"]
    if lr is not None and low > lr:
        yield Problem(c.flag_text("optim.min_lr"), f"is greater than `--lr {lr}`", f"0 to {lr}")


def weight_decay_growth(c: ConfigCheck) -> Iterator[Problem]:
    """Start and end of the weight decay go with a style that changes it."""
    names = ("optim.start_weight_decay", "optim.end_weight_decay")
    typed = [getattr(c.raw.optim, name.split(".")[1]) for name in names]
    style = f"`--weight-decay-incr-style {c['optim.weight_decay_incr_style']}`"
    if c["optim.weight_decay_incr_style"] != "constant":
        missing = [c.flag(n) for n, v in zip(names, typed, strict=True) if v is None and n not in c.invalid]
        if missing:
            yield Problem(style, f"needs {' and '.join(f'`{flag}`' for flag in missing)}")
    elif any(v is not None and v != c["optim.weight_decay"] for v in typed):
        spoken = c.flag_text(*(n for n, v in zip(names, typed, strict=True) if v is not None))
        yield Problem(spoken, f"cannot go with {style}", "--weight-decay-incr-style linear or cosine")


def optimizer_package(c: ConfigCheck) -> Iterator[Problem]:
    """An optimizer of another package can be loaded."""
    if OPTIMIZER in c.invalid:
        return
    try:
        update_rules(c[OPTIMIZER])
    except ValueError as error:
        yield Problem(c.flag_text(OPTIMIZER), str(error))


def adam_kernel(c: ConfigCheck) -> Iterator[Problem]:
    """A kernel is there, and belongs to the optimizer that runs."""
    if KERNEL in c.invalid or not c.is_set(KERNEL) or OPTIMIZER in c.invalid or any(optimizer_package(c)):
        return
    if ADAMW not in update_rules(c[OPTIMIZER]):
        yield Problem(c.flag_text(KERNEL), f"cannot go with {c.flag_text(OPTIMIZER)}", "--optimizer adam")
    elif c[KERNEL] == "apex" and not c.planning and find_spec("apex") is None:
        yield Problem(c.flag_text(KERNEL), "needs apex, which is not installed", "fused, foreach")


def wsd_phases(c: ConfigCheck) -> Iterator[Problem]:
    """WSD says how long its decay is, and that fits between warm-up and end."""
    unit = length_unit(c.raw.batch)
    own, decay = f"optim.lr_wsd_decay_{unit}", c[f"optim.lr_decay_{unit}"]
    if c["optim.lr_decay_style"] != "WSD" or own in c.invalid:
        return
    if c[own] is None:
        other = "optim.lr_wsd_decay_samples" if unit == "iters" else "optim.lr_wsd_decay_iters"
        if c[other] is None or c["task.task"] is not None:  # else it is said that the two units do not mix
            yield Problem(c.flag_text("optim.lr_decay_style"), f"needs `{c.flag(own)}`, the length of the decay at its end")
        return
    if decay is None or {f"optim.lr_decay_{unit}", f"optim.lr_warmup_{unit}", "optim.lr_warmup_fraction"} & c.invalid:
        return
    fraction, warm = c["optim.lr_warmup_fraction"], c[f"optim.lr_warmup_{unit}"]
    warm = warm if fraction is None else int(fraction * decay)
    if warm < decay < warm + c[own]:
        rule = f"is longer than what the warm-up of {warm} leaves of `--lr-decay-{unit} {decay}`"
        yield Problem(c.flag_text(own), rule, f"1 to {decay - warm}")


def warm_up_begin(c: ConfigCheck) -> Iterator[Problem]:
    """A warm-up goes up."""
    lr, begin = c["optim.lr"], c["optim.lr_warmup_init"]
    if lr is not None and begin > lr:
        yield Problem(c.flag_text("optim.lr_warmup_init"), f"is greater than `--lr {lr}`, where the warm-up ends", f"0 to {lr}")


def decoupled_rates(c: ConfigCheck) -> Iterator[Problem]:
    """The floor of word embedding and output layer is not above their peak."""
    peak, name = c["optim.decoupled_lr"], "optim.min_lr" if c["optim.decoupled_min_lr"] is None else "optim.decoupled_min_lr"
    if peak is not None and c[name] > peak:
        yield Problem(c.flag_text(name), f"is greater than `--decoupled-lr {peak}`", f"0 to {peak}, also by --decoupled-min-lr")


def optim_companions(c: ConfigCheck) -> Iterator[Problem]:
    """Settings that mean nothing without another, or not beside another: on resume the schedule comes from one place."""
    yield from needs(c, ["optim.decoupled_min_lr"], "optim.decoupled_lr")
    yield from exclusive(c, "optim.override_opt_param_scheduler", "optim.use_checkpoint_opt_param_scheduler")


def remarks(c: ConfigCheck) -> Iterator[str]:
    """Yield what was said of the learning rate and has no effect."""
    names = ("optim.lr_wsd_decay_style", "optim.lr_wsd_decay_iters", "optim.lr_wsd_decay_samples")
    flags, style = [c.flag(name) for name in names if c.is_set(name)], c["optim.lr_decay_style"]
    if flags and style != "WSD":
        verb = "changes" if len(flags) == 1 else "change"
        yield f"{' and '.join(flags)} {verb} nothing: --lr-decay-style is {style}, not WSD"
    warmed = c["optim.lr_warmup_iters"] or c["optim.lr_warmup_samples"] or c["optim.lr_warmup_fraction"]
    if c.raw.optim.lr_warmup_init and not warmed:
        yield "--lr-warmup-init changes nothing: there is no warm-up"


RULES = Rules(
    every_run=(
        *(learning_rate_given, warm_up, learning_rates, weight_decay_growth, optim_companions),
        *(optimizer_package, adam_kernel, wsd_phases, warm_up_begin, decoupled_rates),
    ),
    pretraining=(one_unit,),
    remarks=(remarks,),
)
