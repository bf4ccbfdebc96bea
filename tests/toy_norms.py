"""A normalisation that the package does not have, as another package would bring it: DyT of arXiv 2503.10622.

It has two parameters, one of them a single number: every rank uses that for all of its positions.
"""

from __future__ import annotations

from torch import Tensor, nn, tanh

from megatron.config.schema import ModelConfig
from megatron.parallel.cost import ActivationBytes, MicroBatchShape
from megatron.parallel.tensor_parallel import TensorParallel


class DynamicTanh(nn.Module):
    """`[..., hidden] -> [..., hidden]`: each channel squeezed by a tanh, whose steepness is learnt."""

    def __init__(self, config: ModelConfig, tp: TensorParallel) -> None:
        super().__init__()
        self.weight = tp.parameter(config.hidden_size, init="ones", decay=False)
        self.steepness = tp.parameter(1, init="ones", decay=False)

    def activation_bytes(self, shape: MicroBatchShape) -> ActivationBytes:
        """Return the bytes of its input and of what is squeezed."""
        return ActivationBytes(saved=2 * shape.hidden_bytes)

    def forward(self, x: Tensor) -> Tensor:
        squeezed: Tensor = self.weight * tanh(self.steepness * x)
        return squeezed


NOT_A_CLASS = 5
