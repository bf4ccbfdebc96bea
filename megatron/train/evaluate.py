"""Compute the mean loss over held-out samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from megatron.contract import Batch
from megatron.launch.watchdog import Watchdog
from megatron.mesh.mesh import Mesh
from megatron.pipeline.executor import Executor
from megatron.train.step import reduce_losses


class Loader(Protocol):
    """Stream of this rank's micro-batches, as `data.loader.MicroBatchLoader` implements it."""

    def next_batches(self, global_batch_size: int) -> list[Batch]: ...

    def close(self) -> None: ...


def evaluate(
    pipeline: Executor,
    loader: Loader,
    mesh: Mesh,
    *,
    steps: int,
    global_batch_size: int,
    watch: Watchdog | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> tuple[float, float] | None:
    """Evaluate the model on held-out samples, with dropout off and without gradients. Collective.

    Args:
        pipeline: runs the forward passes.
        loader: the held-out micro-batches of this rank.
        mesh: the parallel axes.
        steps: number of global batches to evaluate.
        global_batch_size: number of samples in a global batch.
        watch: the watchdog, to which each phase is reported; None reports to none.
        should_stop: called before each global batch; its answer must be the same on all ranks.

    Returns:
        Mean loss over the unmasked tokens, and mean sentence-order loss over the samples, which is 0 without a binary head.
        None if `should_stop` returned true.
    """
    lm_sum = tokens = order_sum = 0.0  # order: the loss of BERT's sentence-order prediction
    watch = watch or Watchdog()
    for _ in range(steps):
        if should_stop():
            return None
        watch.doing("reading held-out data", alone=True)
        batches = loader.next_batches(global_batch_size)
        with torch.no_grad():
            step_lm, step_tokens, _, step_order = reduce_losses(pipeline.evaluate(batches), mesh)
        lm_sum, tokens, order_sum = lm_sum + step_lm, tokens + step_tokens, order_sum + step_order
    # Divided by at least 1, since all tokens may be masked.
    return lm_sum / max(tokens, 1.0), order_sum / max(steps * global_batch_size, 1)
