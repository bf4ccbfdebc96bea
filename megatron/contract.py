"""The types that floors share: what the data hands to the pipeline, and what a model's last stage hands back. Imports no torch.

Tensors of a batch are batch-first, `[micro_batch, seq]`, as the dataset makes them; hidden states inside the model are
sequence-first, `[seq, micro_batch, hidden]`, so that a sequence-parallel shard is contiguous (arXiv 2205.05198).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """One micro-batch as one rank sees it; equal on all ranks of a tensor-parallel group.

    tokens, labels: int64 `[micro_batch, seq]`; the label of a position is the token that follows it.
    loss_mask: fp32 `[micro_batch, seq]`, 1 where the loss counts, else 0.
    positions: int64 `[micro_batch, seq]`, the position each token is embedded at (restarts with --reset-position-ids).
    samples: int64 `[micro_batch]`, the number of each sample in the training order: with the seed it names the random
        numbers of that sample, so dropout does not depend on the layout.
    documents: int64 `[micro_batch, seq]`, equal within a document, where attention must not cross documents; else None.
        Of the whole sample, also where this rank holds a part of it. Padding is a document of its own.
    places: int64 `[seq]`, where in the sample the tokens stand when this rank holds a part of it, under context
        parallelism; None for all of it in order.
    segments: int64 `[micro_batch, seq]`, of BERT: 0 in the first of two segments, 1 in the second; else None.
    swapped: int64 `[micro_batch]`, of BERT: 1 where the second segment's text came before the first's; else None.
    """

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    positions: Tensor
    samples: Tensor
    documents: Tensor | None = None
    places: Tensor | None = None
    segments: Tensor | None = None
    swapped: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`; asynchronous from pinned memory."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin(self) -> Batch:
        """The same batch in pinned host memory."""
        return self._each(lambda tensor: tensor.pin_memory())

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        present = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}
        return replace(self, **{name: change(tensor) for name, tensor in present.items()})


@dataclass(frozen=True)
class Loss:
    """Sum of the token losses that count, and how many count: both additive over micro-batches and ranks.

    sum: fp32 scalar with a graph. tokens: fp32 scalar without one. order: of BERT with a binary head, the sum of the samples'
    sentence-order losses: fp32 scalar with a graph.
    """

    sum: Tensor
    tokens: Tensor
    order: Tensor | None = None


@dataclass(frozen=True)
class StagePart:
    """The slice of a model that one pipeline stage owns: layers by global number, embedding, head."""

    layers: range
    embedding: bool = True
    head: bool = True
