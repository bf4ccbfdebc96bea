"""Activation recomputation: parts of the forward pass save only their input, and run again in the backward pass.

    selective         the core attention of every layer: little work, and all the memory that grows with seq^2 (2205.05198)
    full, uniform     all layers of a stage, in chunks of K; each chunk saves its input (arXiv 1604.06174)
    full, block       the first K layers of a stage, each by itself; the other layers save all their activations

With `distribute`, each tensor-parallel rank saves its share of a chunk's input; the ranks gather the shares before they run the
chunk again. Recomputed layers repeat their collectives in the order of the forward pass, which is the same on every rank.

Dropout masks are functions of the tokens' positions, so both runs compute the same masks. Only for kernels that draw random
numbers themselves (`draws`), the state of torch's generator is restored.
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
    """Selection of the parts of a stage that are recomputed in the backward pass; by default none.

    Attributes:
        granularity: None, "selective" or "full".
        method: "uniform" or "block"; only used if granularity is "full".
        num_layers: the number K above; only used if granularity is "full".
        distribute: the axis over which a chunk's saved input is divided; None to save it whole on every rank.
        draws: whether the forward pass draws numbers from torch's generator.
    """

    granularity: str | None = None
    method: str | None = None
    num_layers: int = 1
    distribute: Axis | None = None
    draws: bool = False

    @classmethod
    def from_config(cls, config: MemoryConfig, tp: Axis, *, draws: bool) -> Recompute:
        """Return the selection of a validated configuration.

        Args:
            config: the memory section.
            tp: the axis over which a chunk's input may be divided.
            draws: whether the forward pass draws numbers from torch's generator.
        """
        distribute = tp if config.distribute_saved_activations and tp.size > 1 else None
        return cls(config.recompute_granularity, config.recompute_method, config.recompute_num_layers, distribute, draws)

    def attention(self, core_attention: Callable[P, Tensor]) -> Callable[P, Tensor]:
        """Return the core attention, wrapped with selective recomputation so that it saves only queries, keys and values."""
        return self._recomputed(core_attention) if self.granularity == "selective" else core_attention

    def run_layers(self, layers: Sequence[T], call: Callable[[T, Tensor], Tensor], x: Tensor) -> Tensor:
        """Apply `call(layer, x)` for one layer after the other, with recomputation if gradients are enabled.

        Args:
            layers: the layers of the stage, in order.
            call: function that runs one layer.
            x: `[...]`; with `distribute`, its number of elements must be a multiple of the axis' size.

        Returns:
            The last layer's output, of the shape of x.
        """
        for chunk, is_recomputed in self.chunks(layers):

            def run(x: Tensor, chunk: Sequence[T] = chunk) -> Tensor:
                for layer in chunk:
                    x = call(layer, x)
                return x

            if not is_recomputed:
                x = run(x)
            elif self.distribute is not None and torch.is_grad_enabled():
                x = self._recomputed_from_shares(run, x, self.distribute)
            else:
                x = self._recomputed(run)(x)
        return x

    def chunks(self, layers: Sequence[T]) -> Iterator[tuple[Sequence[T], bool]]:
        """Yield the layers in chunks, and whether each chunk is recomputed."""
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
        """Return the bytes of a stage's layers with recomputation (2205.05198, section 5).

        A recomputed chunk saves its input, and its other activations exist only while its backward pass runs.

        Args:
            layers: the bytes of each layer without recomputation.
            start: bytes of the input of a layer.
        """
        weight_grad = sum(layer.weight_grad for layer in layers)
        transient = max((layer.transient for layer in layers), default=0)
        if self.granularity == "selective":
            recomputed = max((layer.core for layer in layers), default=0)
            return ActivationBytes(sum(y.saved - y.core for y in layers), 0, transient + recomputed, weight_grad)
        # The activations of a recomputed chunk include its input, which is in memory already unless only a share was saved.
        saved_input, in_memory = (start, start) if self.distribute is None else (start // self.distribute.size, 0)
        saved, largest = 0, 0
        for chunk, is_recomputed in self.chunks(layers):
            whole = sum(layer.saved for layer in chunk)
            saved += saved_input if is_recomputed else whole
            largest = max(largest, whole - in_memory) if is_recomputed else largest
        return ActivationBytes(saved, 0, transient + largest, weight_grad)

    def _recomputed(self, function: Callable[P, Tensor]) -> Callable[P, Tensor]:
        def recomputed(*args: P.args, **kwargs: P.kwargs) -> Tensor:
            if not torch.is_grad_enabled():
                return function(*args, **kwargs)
            call: Callable[..., Tensor] = checkpoint
            return call(function, *args, use_reentrant=False, preserve_rng_state=self.draws, **kwargs)

        return recomputed

    def _recomputed_from_shares(self, function: Callable[[Tensor], Tensor], x: Tensor, axis: Axis) -> Tensor:
        """Return `function(x)`, saving only this rank's share of x `[...]` for the recomputation."""
        shape, whole = x.shape, [x]

        def run(share: Tensor) -> Tensor:
            # The first run uses x itself. The second one only supplies the values of tensors that were not saved, so its input
            # is a new leaf, without the graph before x. [...]
            joined = whole.pop() if whole else all_gather(share, axis).view(shape).requires_grad_()
            return function(joined)  # [...]

        share = own_slice(x.detach().flatten(), axis).clone()  # [elements / tp]; a clone, so that x itself can be freed
        return self._recomputed(run)(share)
