"""Settings of the number formats and the loss scale."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron.config.check import ConfigCheck, Rules
from megatron.config.errors import Problem
from megatron.config.option import NOT_NEGATIVE, POSITIVE, option

INITIAL, LEAST, CONSTANT = "precision.initial_loss_scale", "precision.min_loss_scale", "precision.loss_scale"
DYNAMIC = (INITIAL, LEAST, "precision.loss_scale_window", "precision.hysteresis")
GRADIENTS = "precision.grad_reduce_in_bf16"


@dataclass(frozen=True)
class PrecisionConfig:
    """Number formats. Main weights and optimizer state are always fp32."""

    bf16: bool = option(False, "compute in bfloat16")
    fp16: bool = option(False, "compute in float16, with a loss scale")
    loss_scale: float | None = option(
        None, "constant loss scale; default, and 0, dynamic with --fp16, else 1", legal=NOT_NEGATIVE
    )
    initial_loss_scale: float = option(4294967296.0, "where the dynamic loss scale begins", legal=POSITIVE)
    min_loss_scale: float = option(1.0, "the dynamic loss scale never falls below this", legal=POSITIVE)
    loss_scale_window: float = option(1000.0, "updates in a row after which the dynamic loss scale doubles", legal=POSITIVE)
    hysteresis: int = option(
        2, "overflows since the last doubling after which each one halves the dynamic loss scale", legal=POSITIVE
    )
    grad_reduce_in_bf16: bool = option(
        False,
        "of --bf16: accumulate and reduce gradients in bfloat16 too, in half the bytes; default in fp32",
        values={"--accumulate-allreduce-grads-in-fp32": False},
    )
    gradient_accumulation_fusion: bool = option(
        True,
        "on a GPU with 16-bit weights, fp32 gradients and uncompiled layers: add weight gradients within their matrix product",
        off="--no-gradient-accumulation-fusion",
    )

    @property
    def is_16bit(self) -> bool:
        """True where the model's weights and activations are 16-bit numbers."""
        return self.bf16 or self.fp16


def dynamic_scale(precision: PrecisionConfig) -> bool:
    """True where the loss scale is found by trying."""
    return precision.fp16 and not precision.loss_scale


def one_format(c: ConfigCheck) -> Iterator[Problem]:
    """A model computes in one format."""
    if c["precision.fp16"] and c["precision.bf16"]:
        yield Problem(c.flag_text("precision.fp16", "precision.bf16"), "exclude each other; give one of them, or none for fp32")


def gradients_in_bf16(c: ConfigCheck) -> Iterator[Problem]:
    """Gradients have no fewer digits than the numbers they are made from, and fp16's would overflow."""
    if c[GRADIENTS] and not c["precision.bf16"]:
        yield Problem(c.flag_text(GRADIENTS), "needs `--bf16`: only gradients of bfloat16 weights are kept in bfloat16")


def scale_range(c: ConfigCheck) -> Iterator[Problem]:
    """A dynamic scale does not begin below its floor."""
    if dynamic_scale(c.resolved.precision) and not c.invalid & {INITIAL, LEAST} and c[LEAST] > c[INITIAL]:
        yield Problem(
            c.flag_text(LEAST), f"is greater than {c.flag_text(INITIAL)}, where the scale begins", f"0 to {c[INITIAL]:g}"
        )


def dynamic_scale_skips(c: ConfigCheck) -> Iterator[Problem]:
    """A dynamic scale overflows in order to find its size, so an overflow is no reason to stop."""
    if dynamic_scale(c.resolved.precision) and c["optim.on_nonfinite"] == "abort" and CONSTANT not in c.invalid:
        rule = "cannot go with the dynamic loss scale of `--fp16`, which overflows now and then to find its size"
        yield Problem(
            c.flag_text("optim.on_nonfinite"), rule, "--on-nonfinite skip with --max-consecutive-skips, or a --loss-scale"
        )


def remarks(c: ConfigCheck) -> Iterator[str]:
    """Yield the settings of the dynamic scale in a run that has none, as Megatron-LM's scripts often give them."""
    precision = c.raw.precision
    if dynamic_scale(precision):
        return
    why = "only --fp16 has a dynamic loss scale"
    if precision.loss_scale:
        why = f"--loss-scale {precision.loss_scale:g} is constant"
    for name in DYNAMIC:
        if c.is_set(name):
            yield f"{c.flag(name)} changes nothing: {why}"


RULES = Rules(every_run=(one_format, gradients_in_bf16, scale_range, dynamic_scale_skips), remarks=(remarks,))
