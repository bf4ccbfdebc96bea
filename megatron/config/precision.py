"""Settings of mixed precision: number formats and the loss scale (arXiv 1710.03740)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron.config.check import ConfigCheck, Rules
from megatron.config.errors import Problem
from megatron.config.option import NOT_NEGATIVE, POSITIVE, option

INITIAL, MINIMUM, CONSTANT = "precision.initial_loss_scale", "precision.min_loss_scale", "precision.loss_scale"
DYNAMIC_ONLY = (INITIAL, MINIMUM, "precision.loss_scale_window", "precision.hysteresis")  # unused with a constant scale
GRADIENTS = "precision.grad_reduce_in_bf16"


@dataclass(frozen=True)
class PrecisionConfig:
    """Number formats and the loss scale. Main weights and optimizer state are always fp32."""

    bf16: bool = option(False, "compute in bfloat16")
    fp16: bool = option(False, "compute in float16, with loss scaling")
    loss_scale: float | None = option(
        None, "constant loss scale, or 0 for the default (default: dynamic with --fp16, else 1)", legal=NOT_NEGATIVE
    )
    initial_loss_scale: float = option(4294967296.0, "initial value of the dynamic loss scale", legal=POSITIVE)
    min_loss_scale: float = option(1.0, "lower bound of the dynamic loss scale", legal=POSITIVE)
    loss_scale_window: float = option(
        1000.0, "consecutive finite steps after which the dynamic loss scale doubles", legal=POSITIVE
    )
    hysteresis: int = option(
        2, "overflows since the last doubling from which on each halves the dynamic loss scale", legal=POSITIVE
    )
    grad_reduce_in_bf16: bool = option(
        False,
        "with --bf16: accumulate and reduce gradients in bfloat16, at half the memory and traffic (default: in fp32)",
        shortcuts={"--accumulate-allreduce-grads-in-fp32": False},
    )
    gradient_accumulation_fusion: bool = option(
        True,
        "accumulation of weight gradients inside their matrix product, on a GPU with 16-bit weights, fp32 gradients and "
        "uncompiled layers",
        off_flag="--no-gradient-accumulation-fusion",
    )

    @property
    def is_16bit(self) -> bool:
        """True when the model's weights and activations are 16-bit numbers."""
        return self.bf16 or self.fp16


def dynamic_scale(precision: PrecisionConfig) -> bool:
    """Return whether the loss scale adapts to overflows, as it does with --fp16 and without a constant scale."""
    return precision.fp16 and not precision.loss_scale


def one_format(c: ConfigCheck) -> Iterator[Problem]:
    """At most one 16-bit format is chosen."""
    if c["precision.fp16"] and c["precision.bf16"]:
        yield Problem(c.flag_text("precision.fp16", "precision.bf16"), "exclude each other; give one of them, or none for fp32")


def gradients_in_bf16(c: ConfigCheck) -> Iterator[Problem]:
    """Gradients are reduced in bfloat16 only if the weights are bfloat16."""
    if c[GRADIENTS] and not c["precision.bf16"]:
        yield Problem(c.flag_text(GRADIENTS), "needs `--bf16`: only gradients of bfloat16 weights are kept in bfloat16")


def scale_range(c: ConfigCheck) -> Iterator[Problem]:
    """The dynamic loss scale begins at its lower bound or above."""
    if dynamic_scale(c.resolved.precision) and not c.invalid & {INITIAL, MINIMUM} and c[MINIMUM] > c[INITIAL]:
        yield Problem(
            c.flag_text(MINIMUM), f"is greater than {c.flag_text(INITIAL)}, where the scale begins", f"0 to {c[INITIAL]:g}"
        )


def dynamic_scale_skips(c: ConfigCheck) -> Iterator[Problem]:
    """A run with a dynamic loss scale does not abort on an overflow: the scale grows until it overflows, then shrinks."""
    if dynamic_scale(c.resolved.precision) and c["optim.on_nonfinite"] == "abort" and CONSTANT not in c.invalid:
        rule = "conflicts with the dynamic loss scale of `--fp16`, which grows until it overflows"
        yield Problem(
            c.flag_text("optim.on_nonfinite"), rule, "--on-nonfinite skip with --max-consecutive-skips, or a --loss-scale"
        )


def remarks(c: ConfigCheck) -> Iterator[str]:
    """Yield a remark for each setting of the dynamic loss scale in a run without one.

    These are remarks rather than problems because many of Megatron-LM's scripts give such settings together with --bf16.
    """
    precision = c.raw.precision
    if dynamic_scale(precision):
        return
    why = "only --fp16 has a dynamic loss scale"
    if precision.loss_scale:
        why = f"--loss-scale {precision.loss_scale:g} is constant"
    for name in DYNAMIC_ONLY:
        if c.is_set(name):
            yield f"{c.flag(name)} changes nothing: {why}"


RULES = Rules(every_run=(one_format, gradients_in_bf16, scale_range, dynamic_scale_skips), remarks=(remarks,))
