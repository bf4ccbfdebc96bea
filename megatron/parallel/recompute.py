"""Activation recomputation: a part of the forward pass keeps its input alone and is run again in the backward pass.

    selective         the core attention of every layer: little work, and all that grows with seq^2 (arXiv 2205.05198)
    full, uniform     all layers of a stage, in chunks of K: each chunk keeps its input (arXiv 1604.06174)
    full, block       the first K layers of a stage, each by itself; the others keep what they need

With `distribute` each tensor-parallel rank keeps its share of a chunk's input, and they join the shares before they run the
chunk again. Recomputed layers communicate again, in the order in which they do forward, so the same on every rank.

Dropout needs no care: its masks are functions of the tokens' places. Only a kernel that draws for itself (`draws`) has its
generator put back to where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron.config.schema import MemoryConfig
from megatron.mesh.mesh import Axis
from megatron.parallel.collectives import all_gather, own_slice
from megatron.parallel.cost import ActivationBytes

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Recompute:
    """Choice of what a stage runs again in the backward pass; by default nothing.

    granularity: None, "selective" or "full"; method ("uniform" or "block") and num_layers, the K above, are of "full".
    distribute: the axis over which a chunk's input is cut, None to keep it whole on every rank. draws: whether the forward
    pass takes numbers from torch's generator.
    """

    granularity: str | None = None
    method: str | None = None
    num_layers: int = 1
    distribute: Axis | None = None
    draws: bool = False

    @classmethod
    def from_config(cls, config: MemoryConfig, tp: Axis, *, draws: bool) -> Recompute:
        """Return what a legal configuration asks for.

        Args:
            config: the memory section.
            tp: the axis that a chunk's input may be cut over.
            draws: whether the forward pass takes numbers from torch's generator.
        """
        distribute = tp if config.distribute_saved_activations and tp.size > 1 else None
        return cls(config.recompute_granularity, config.recompute_method, config.recompute_num_layers, distribute, draws)

    def attention(self, core_attention: Callable[P, Tensor]) -> Callable[P, Tensor]:
        """Return the core attention, itself or one that keeps only queries, keys and values."""
        return self._again(core_attention) if self.granularity == "selective" else core_attention

    def through(self, layers: Sequence[T], call: Callable[[T, Tensor], Tensor], x: Tensor) -> Tensor:
        """Run `call(layer, x)` for one layer after the other. Without gradients nothing is kept, and nothing run again.

        Args:
            layers: of the stage, in their order.
            call: runs one of them.
            x: `[...]`; with `distribute` its number of elements is a multiple of the axis' size.

        Returns:
            The last layer's output, like x.
        """
        for chunk, again in self.chunks(layers):

            def run(x: Tensor, chunk: Sequence[T] = chunk) -> Tensor:
                for layer in chunk:
                    x = call(layer, x)
                return x

            if not again:
                x = run(x)
            elif self.distribute is not None and torch.is_grad_enabled():
                x = self._again_from_shares(run, x, self.distribute)
            else:
                x = self._again(run)(x)
        return x

    def chunks(self, layers: Sequence[T]) -> Iterator[tuple[Sequence[T], bool]]:
        """Yield the layers in pieces, and whether a piece is run again."""
        count = min(self.num_layers, len(layers))
        if self.granularity != "full":
            yield layers, False
        elif self.method == "uniform":
            for first in range(0, len(layers), self.num_layers):
                yield layers[first : first + self.num_layers], True
        else:
            for i in range(count):
                yield layers[i : i + 1], True
            yield layers[count:], False

    def activation_bytes(self, layers: Sequence[ActivationBytes], start: int) -> ActivationBytes:
        """Return what a stage's layers take together; what is run again keeps its input, and passes by once (2205.05198, 5).

        Args:
            layers: what each of them takes where nothing is run again.
            start: bytes of a layer's input.
        """
        weight_grad = sum(layer.weight_grad for layer in layers)
        transient = max((layer.transient for layer in layers), default=0)
        if self.granularity == "selective":
            again = max((layer.core for layer in layers), default=0)
            return ActivationBytes(sum(y.saved - y.core for y in layers), 0, transient + again, weight_grad)
        # A chunk's layers keep their inputs too: its own is there already, unless each rank has a share of it.
        share, there = (start, start) if self.distribute is None else (start // self.distribute.size, 0)
        saved, most = 0, 0
        for chunk, again in self.chunks(layers):
            whole = sum(layer.saved for layer in chunk)
            saved += share if again else whole
            most = max(most, whole - there) if again else most
        return ActivationBytes(saved, 0, transient + most, weight_grad)

    def _again(self, function: Callable[P, Tensor]) -> Callable[P, Tensor]:
        def recomputed(*args: P.args, **kwargs: P.kwargs) -> Tensor:
            if not torch.is_grad_enabled():
                return function(*args, **kwargs)
            call: Callable[..., Tensor] = checkpoint
            return call(function, *args, use_reentrant=False, preserve_rng_state=self.draws, **kwargs)

        return recomputed

    def _again_from_shares(self, function: Callable[[Tensor], Tensor], x: Tensor, axis: Axis) -> Tensor:
        """Return `function(x)`, keeping this rank's share of x alone."""
        shape, whole = x.shape, [x]

        def run(share: Tensor) -> Tensor:
            # Backward, the tensors that were not kept take their values from a second run. It needs no connection to what
            # came before x, so its input is a new leaf.
            joined = whole.pop() if whole else all_gather(share, axis).view(shape).requires_grad_()
            return function(joined)

        share = own_slice(x.detach().flatten(), axis).clone()  # [elements / tp]; a clone, so that x itself is free to go
        return self._again(run)(share)
