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

    optimizer: str = option(
        "adam", "optimizer; adam is AdamW, with decoupled weight decay (arXiv 1711.05101)", choices=tuple(OPTIMIZERS)
    )
    lr: float | None = option(None, "peak learning rate", legal=NOT_NEGATIVE)
    min_lr: float = option(0.0, "minimum learning rate, at which the decay ends", legal=NOT_NEGATIVE)
    decoupled_lr: float | None = option(
        None, "peak learning rate of word embedding and output layer (default: --lr)", legal=NOT_NEGATIVE
    )
    decoupled_min_lr: float | None = option(None, "minimum of --decoupled-lr (default: --min-lr)", legal=NOT_NEGATIVE)
    lr_decay_style: str = option(
        "linear",
        "decay of the learning rate after warm-up; WSD (warm-up, stable, decay; arXiv 2404.06395) stays at --lr until a decay "
        "at the end",
        choices=("constant", "linear", "cosine", "inverse-square-root", "WSD"),
    )
    lr_wsd_decay_style: str = option(
        "exponential", "decay at the end of WSD", choices=("exponential", "linear", "cosine", "minus_sqrt")
    )
    lr_wsd_decay_iters: int | None = option(None, "WSD: iterations of the decay, the last of --lr-decay-iters", legal=POSITIVE)
    lr_wsd_decay_samples: int | None = option(None, "WSD: samples of the decay, the last of --lr-decay-samples", legal=POSITIVE)
    lr_decay_iters: int | None = option(None, "iterations until --min-lr is reached (default: --train-iters)", legal=POSITIVE)
    lr_decay_samples: int | None = option(None, "samples until --min-lr is reached (default: --train-samples)", legal=POSITIVE)
    lr_warmup_fraction: float | None = option(
        None, "length of the linear warm-up, as a fraction of the decay's", legal=FROM_0_BELOW_1
    )
    lr_warmup_iters: int = option(0, "length of the linear warm-up, in iterations", legal=NOT_NEGATIVE)
    lr_warmup_samples: int = option(0, "length of the linear warm-up, in samples", legal=NOT_NEGATIVE)
    lr_warmup_init: float = option(0.0, "learning rate at the start of the warm-up", legal=NOT_NEGATIVE)
    weight_decay: float = option(
        0.01,
        "weight decay of matrices, not of biases and norms; decoupled with adam, in the gradient with sgd",
        legal=NOT_NEGATIVE,
    )
    start_weight_decay: float | None = option(
        None, "weight decay at the start, with a --weight-decay-incr-style", legal=NOT_NEGATIVE
    )
    end_weight_decay: float | None = option(
        None, "weight decay at the end, with a --weight-decay-incr-style", legal=NOT_NEGATIVE
    )
    weight_decay_incr_style: str = option(
        "constant", "change of the weight decay from its start to its end", choices=("constant", "linear", "cosine")
    )
    clip_grad: float = option(
        1.0, "maximum L2 norm of all gradients, to which they are clipped; 0: do not clip", legal=NOT_NEGATIVE
    )
    adam_beta1: float = option(0.9, "Adam: decay rate of the first moment", legal=FROM_0_BELOW_1)
    adam_beta2: float = option(0.999, "Adam: decay rate of the second moment", legal=FROM_0_BELOW_1)
    adam_eps: float = option(1e-8, "Adam: epsilon, added to the root of the second moment", legal=POSITIVE)
    adam_kernel: str = option(
        "fused", "implementation of AdamW: torch's fused or foreach, or apex's FusedAdam", choices=("fused", "foreach", "apex")
    )
    sgd_momentum: float = option(0.9, "SGD: momentum", legal=FROM_0_BELOW_1)
    override_opt_param_scheduler: bool = option(
        False,
        "on resume, take the schedules of learning rate and weight decay from the command line; if they differ from the "
        "checkpoint's, this flag or --use-checkpoint-opt_param-scheduler is required",
        aliases=("--override-lr-scheduler",),
        flag="--override-opt_param-scheduler",
    )
    use_checkpoint_opt_param_scheduler: bool = option(
        False,
        "on resume, take the schedules of learning rate and weight decay from the checkpoint",
        aliases=("--use-checkpoint-lr-scheduler",),
        flag="--use-checkpoint-opt_param-scheduler",
    )
    on_nonfinite: str = option(
        "skip", "reaction to NaN or Inf in the gradients: skip the step, or end the run", choices=("skip", "abort")
    )
    max_consecutive_skips: int = option(50, "consecutive skipped steps after which the run ends", legal=POSITIVE)


@dataclass(frozen=True, kw_only=True)
class OptimConfig(OptimSettings):
    """Resolved optimizer and learning-rate schedule, with the weight decay at the start and at the end."""

    start_weight_decay: float = field()
    end_weight_decay: float = field()


def derive_optim(optim: OptimSettings, batch: BatchSettings) -> OptimSettings:
    """Fill in the length of the decay, and the weight decay at the start and at the end, as Megatron-LM does."""
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
    """Return the unit of a run's length and of its learning-rate schedule: "iters" or "samples", the suffixes of flags."""
    return "iters" if batch.train_samples is None else "samples"


def learning_rate_given(c: ConfigCheck) -> Iterator[Problem]:
    """A run that trains has a learning rate."""
    if not c["eval.skip_train"]:
        yield from missing(c, ["optim.lr"])


def one_unit(c: ConfigCheck) -> Iterator[Problem]:
    """The lengths of a run and of its schedule are all in iterations, or all in samples."""
    raw = c.raw
    if c.iterations_chosen and raw.batch.train_samples is not None:
        yield Problem(c.flag_text("batch.train_iters", "batch.train_samples"), "exclude each other; give one of them")
        return
    other_unit = {
        "batch.train_iters": ("optim.lr_decay_samples", "optim.lr_warmup_samples", "optim.lr_wsd_decay_samples"),
        "batch.train_samples": ("optim.lr_decay_iters", "optim.lr_warmup_iters", "optim.lr_wsd_decay_iters"),
    }
    unit = f"batch.train_{length_unit(raw.batch)}"
    for name in other_unit[unit]:
        if c[unit] is not None and c.is_set(name):
            yield Problem(c.flag_text(name), f"conflicts with `{c.flag(unit)}`: iterations and samples do not mix")


def warm_up(c: ConfigCheck) -> Iterator[Problem]:
    """The length of the warm-up is given by one flag, and is less than that of the decay, which includes it."""
    explicit = [n for n in ("optim.lr_warmup_iters", "optim.lr_warmup_samples") if c.is_set(n) and n not in c.invalid]
    if c["optim.lr_warmup_fraction"] is not None and explicit:
        yield Problem(c.flag_text("optim.lr_warmup_fraction", *explicit), "exclude each other; give one of them")
    for unit in ("iters", "samples"):
        warmup, decay = c[f"optim.lr_warmup_{unit}"], c[f"optim.lr_decay_{unit}"]
        if warmup and decay and warmup >= decay:
            rule = f"is not less than `--lr-decay-{unit} {decay}`, where the decay ends"
            yield Problem(c.flag_text(f"optim.lr_warmup_{unit}"), rule, f"0 to {decay - 1}")


def learning_rates(c: ConfigCheck) -> Iterator[Problem]:
    """The minimum learning rate is not above the peak."""
    lr, min_lr = c["optim.lr"], c["optim.min_lr"]
    if lr is not None and min_lr > lr:
        yield Problem(c.flag_text("optim.min_lr"), f"is greater than `--lr {lr}`", f"0 to {lr}")


def weight_decay_growth(c: ConfigCheck) -> Iterator[Problem]:
    """The weight decay at the start and at the end are given for the styles that change it, and only for those."""
    names = ("optim.start_weight_decay", "optim.end_weight_decay")
    values = [getattr(c.raw.optim, name.split(".")[1]) for name in names]
    style = f"`--weight-decay-incr-style {c['optim.weight_decay_incr_style']}`"
    if c["optim.weight_decay_incr_style"] != "constant":
        absent = [c.flag(n) for n, v in zip(names, values, strict=True) if v is None and n not in c.invalid]
        if absent:
            yield Problem(style, f"needs {' and '.join(f'`{flag}`' for flag in absent)}")
    # Values equal to --weight-decay are legal: `derive_optim` fills them in, so a resolved configuration contains them.
    elif any(v is not None and v != c["optim.weight_decay"] for v in values):
        flags = c.flag_text(*(n for n, v in zip(names, values, strict=True) if v is not None))
        yield Problem(flags, f"cannot be combined with {style}", "--weight-decay-incr-style linear or cosine")


def optimizer_package(c: ConfigCheck) -> Iterator[Problem]:
    """An optimizer of another package can be imported."""
    if OPTIMIZER in c.invalid:
        return
    try:
        update_rules(c[OPTIMIZER])
    except ValueError as error:
        yield Problem(c.flag_text(OPTIMIZER), str(error))


def adam_kernel(c: ConfigCheck) -> Iterator[Problem]:
    """--adam-kernel is given only with an optimizer that uses AdamW, and its implementation is installed."""
    if KERNEL in c.invalid or not c.is_set(KERNEL) or OPTIMIZER in c.invalid or any(optimizer_package(c)):
        return
    if ADAMW not in update_rules(c[OPTIMIZER]):
        yield Problem(c.flag_text(KERNEL), f"conflicts with {c.flag_text(OPTIMIZER)}", "--optimizer adam")
    elif c[KERNEL] == "apex" and not c.planning and find_spec("apex") is None:
        yield Problem(c.flag_text(KERNEL), "needs apex, which is not installed", "fused, foreach")


def wsd_phases(c: ConfigCheck) -> Iterator[Problem]:
    """The length of the WSD decay is given in the run's unit, and the decay begins after the warm-up."""
    unit = length_unit(c.raw.batch)
    wsd_decay, decay = f"optim.lr_wsd_decay_{unit}", c[f"optim.lr_decay_{unit}"]
    if c["optim.lr_decay_style"] != "WSD" or wsd_decay in c.invalid:
        return
    if c[wsd_decay] is None:
        other = "optim.lr_wsd_decay_samples" if unit == "iters" else "optim.lr_wsd_decay_iters"
        if c[other] is None or c["task.task"] is not None:  # in pretraining, `one_unit` reports a length in the other unit
            yield Problem(
                c.flag_text("optim.lr_decay_style"), f"needs `{c.flag(wsd_decay)}`, the length of the decay at its end"
            )
        return
    if decay is None or {f"optim.lr_decay_{unit}", f"optim.lr_warmup_{unit}", "optim.lr_warmup_fraction"} & c.invalid:
        return
    fraction, warmup = c["optim.lr_warmup_fraction"], c[f"optim.lr_warmup_{unit}"]
    warmup = warmup if fraction is None else int(fraction * decay)  # rounded down, as in optim/lr.py
    if warmup < decay < warmup + c[wsd_decay]:
        rule = f"is longer than what the warm-up of {warmup} leaves of `--lr-decay-{unit} {decay}`"
        yield Problem(c.flag_text(wsd_decay), rule, f"1 to {decay - warmup}")


def warm_up_start(c: ConfigCheck) -> Iterator[Problem]:
    """The learning rate at the start of the warm-up is not above the peak."""
    lr, initial_lr = c["optim.lr"], c["optim.lr_warmup_init"]
    if lr is not None and initial_lr > lr:
        yield Problem(c.flag_text("optim.lr_warmup_init"), f"is greater than `--lr {lr}`, where the warm-up ends", f"0 to {lr}")


def decoupled_rates(c: ConfigCheck) -> Iterator[Problem]:
    """The minimum learning rate of word embedding and output layer is not above their peak."""
    peak, name = c["optim.decoupled_lr"], "optim.min_lr" if c["optim.decoupled_min_lr"] is None else "optim.decoupled_min_lr"
    if peak is not None and c[name] > peak:
        yield Problem(c.flag_text(name), f"is greater than `--decoupled-lr {peak}`", f"0 to {peak}, also by --decoupled-min-lr")


def optim_companions(c: ConfigCheck) -> Iterator[Problem]:
    """--decoupled-min-lr needs --decoupled-lr, and on resume the schedule comes from one source."""
    yield from needs(c, ["optim.decoupled_min_lr"], "optim.decoupled_lr")
    yield from exclusive(c, "optim.override_opt_param_scheduler", "optim.use_checkpoint_opt_param_scheduler")


def remarks(c: ConfigCheck) -> Iterator[str]:
    """Yield remarks on settings of WSD with another style, and on --lr-warmup-init without a warm-up."""
    names = ("optim.lr_wsd_decay_style", "optim.lr_wsd_decay_iters", "optim.lr_wsd_decay_samples")
    flags, style = [c.flag(name) for name in names if c.is_set(name)], c["optim.lr_decay_style"]
    if flags and style != "WSD":
        verb = "changes" if len(flags) == 1 else "change"
        yield f"{' and '.join(flags)} {verb} nothing: --lr-decay-style is {style}, not WSD"
    has_warmup = c["optim.lr_warmup_iters"] or c["optim.lr_warmup_samples"] or c["optim.lr_warmup_fraction"]
    if c.raw.optim.lr_warmup_init and not has_warmup:
        yield "--lr-warmup-init changes nothing: there is no warm-up"


RULES = Rules(
    every_run=(
        *(learning_rate_given, warm_up, learning_rates, weight_decay_growth, optim_companions),
        *(optimizer_package, adam_kernel, wsd_phases, warm_up_start, decoupled_rates),
    ),
    pretraining=(one_unit,),
    remarks=(remarks,),
)
