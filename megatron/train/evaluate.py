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
    """A stream of this rank's micro-batches, `data.loader.MicroBatchLoader`."""

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
        steps: global batches to evaluate.
        global_batch_size: samples of each global batch.
        watch: the watchdog, to which the phases are reported.
        should_stop: called before each global batch; its answer must be the same on all ranks.

    Returns:
        Mean loss over the unmasked tokens, and mean sentence-order loss over the samples, which is 0 without a binary head.
        None if `should_stop` returned true.
    """
    loss = tokens = order = 0.0
    watch = watch or Watchdog()
    for _ in range(steps):
        if should_stop():
            return None
        watch.doing("reading held-out data", alone=True)
        batches = loader.next_batches(global_batch_size)
        with torch.no_grad():
            step_loss, step_tokens, _, step_order = reduce_losses(pipeline.evaluate(batches), mesh)
        loss, tokens, order = loss + step_loss, tokens + step_tokens, order + step_order
    # At least 1, since all tokens may be masked.
    return loss / max(tokens, 1.0), order / max(steps * global_batch_size, 1)
