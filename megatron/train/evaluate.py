"""The mean loss over held-out samples."""

from __future__ import annotations

from typing import Protocol

import torch

from megatron.contract import Batch
from megatron.mesh.mesh import Mesh
from megatron.pipeline.executor import Executor
from megatron.train.step import totals


class Loader(Protocol):
    """A stream of this rank's micro-batches, `data.loader.Loader`."""

    def next_batches(self, global_batch_size: int) -> list[Batch]: ...

    def close(self) -> None: ...


def evaluate(pipeline: Executor, loader: Loader, mesh: Mesh, *, steps: int, global_batch_size: int) -> float:
    """Mean loss of the tokens that count over `steps` global batches; dropout off, no gradients. Collective."""
    loss = tokens = 0.0
    for _ in range(steps):
        with torch.no_grad():
            step_loss, step_tokens, _ = totals(pipeline.evaluate(loader.next_batches(global_batch_size)), mesh)
        loss, tokens = loss + step_loss, tokens + step_tokens
    return loss / max(tokens, 1.0)
