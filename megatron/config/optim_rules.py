"""The rules of the optimizer's layout and of its kernels."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

from megatron.config.case import Case, Rule
from megatron.config.errors import Problem

GATHER = "layout.overlap_param_gather"
KERNEL = "optim.adam_kernel"


def param_gather(c: Case) -> Iterator[Problem]:
    """Weights are gathered where each rank has updated a slice of them, before uncompiled layers."""
    if not c[GATHER]:
        return
    if not c["layout.use_distributed_optimizer"]:
        yield Problem(c.flag_text(GATHER), "needs `--use-distributed-optimizer`: without it every rank updates all its weights")
    if c["batch.compile"]:
        yield Problem(
            c.flag_text(GATHER), "cannot go with `--compile`, whose layers do not wait for their weights; leave one out"
        )


def adam_kernel(c: Case) -> Iterator[Problem]:
    """A kernel is there, and belongs to the optimizer that runs."""
    if KERNEL in c.bad or not c.given(KERNEL):
        return
    if c["optim.optimizer"] != "adam":
        yield Problem(c.flag_text(KERNEL), f"cannot go with {c.flag_text('optim.optimizer')}", "--optimizer adam")
    elif c[KERNEL] == "apex" and not c.planning and find_spec("apex") is None:
        yield Problem(c.flag_text(KERNEL), "needs apex, which is not installed", "fused, foreach")


OPTIM_RULES: tuple[Rule, ...] = (param_gather, adam_kernel)
