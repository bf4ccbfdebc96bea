"""The rules of number formats and the loss scale, and of iterations that are left out."""

from __future__ import annotations

from collections.abc import Iterator

from megatron.config.case import Case, Rule
from megatron.config.errors import Problem
from megatron.config.iterations import ranges_of
from megatron.config.schema import PrecisionConfig

INITIAL, LEAST, CONSTANT = "precision.initial_loss_scale", "precision.min_loss_scale", "precision.loss_scale"
DYNAMIC = (INITIAL, LEAST, "precision.loss_scale_window", "precision.hysteresis")
GRADIENTS = "precision.grad_reduce_in_bf16"
SKIPPED = "batch.skip_train_iterations"


def dynamic_scale(precision: PrecisionConfig) -> bool:
    """Whether the loss scale is found by trying."""
    return precision.fp16 and not precision.loss_scale


def one_format(c: Case) -> Iterator[Problem]:
    """A model computes in one format."""
    if c["precision.fp16"] and c["precision.bf16"]:
        yield Problem(c.flag_text("precision.fp16", "precision.bf16"), "exclude each other; give one of them, or none for fp32")


def gradients_in_bf16(c: Case) -> Iterator[Problem]:
    """Gradients have no fewer digits than the numbers they are made from, and fp16's would overflow."""
    if c[GRADIENTS] and not c["precision.bf16"]:
        yield Problem(c.flag_text(GRADIENTS), "needs `--bf16`: only gradients of bfloat16 weights are kept in bfloat16")


def scale_range(c: Case) -> Iterator[Problem]:
    """A dynamic scale does not begin below its floor."""
    if dynamic_scale(c.resolved.precision) and not c.bad & {INITIAL, LEAST} and c[LEAST] > c[INITIAL]:
        yield Problem(
            c.flag_text(LEAST), f"is greater than {c.flag_text(INITIAL)}, where the scale begins", f"0 to {c[INITIAL]:g}"
        )


def dynamic_scale_skips(c: Case) -> Iterator[Problem]:
    """A dynamic scale overflows in order to find its size, so an overflow is no reason to stop."""
    if dynamic_scale(c.resolved.precision) and c["optim.on_nonfinite"] == "abort" and CONSTANT not in c.bad:
        rule = "cannot go with the dynamic loss scale of `--fp16`, which overflows now and then to find its size"
        yield Problem(
            c.flag_text("optim.on_nonfinite"), rule, "--on-nonfinite skip with --max-consecutive-skips, or a --loss-scale"
        )


def skipped_iterations(c: Case) -> Iterator[Problem]:
    """Iterations that are left out are numbers and ranges of numbers."""
    try:
        ranges_of(c[SKIPPED])
    except ValueError as error:
        yield Problem(c.flag_text(SKIPPED), str(error), "numbers and ranges such as 120 300-310, from 1 on")


PRECISION_RULES: tuple[Rule, ...] = (one_format, gradients_in_bf16, scale_range, dynamic_scale_skips, skipped_iterations)


def precision_remarks(precision: PrecisionConfig) -> Iterator[str]:
    """Settings of the dynamic scale in a run that has none, as Megatron-LM's scripts often give them."""
    if dynamic_scale(precision):
        return
    why = "only --fp16 has a dynamic loss scale"
    if precision.loss_scale:
        why = f"--loss-scale {precision.loss_scale:g} is constant"
    default = PrecisionConfig()
    for name in (name.split(".")[1] for name in DYNAMIC):
        if getattr(precision, name) != getattr(default, name):
            yield f"--{name.replace('_', '-')} changes nothing: {why}"
