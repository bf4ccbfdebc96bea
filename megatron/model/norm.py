"""Normalisation over the last dimension. A new one needs a class here, and a row in config/normalizations.py."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from megatron.config.normalizations import norm_class
from megatron.config.schema import ModelConfig
from megatron.parallel.cost import ActivationBytes, MicroBatchShape
from megatron.parallel.tensor_parallel import TensorParallel


class Norm(nn.Module):
    """Normalisation, `[..., hidden] -> [..., hidden]`, with a weight; with a bias if `has_bias` and `config.add_norm_bias`.

    With apply_layernorm_1p the stored weight is gamma - 1.
    """

    has_bias = False

    def __init__(self, config: ModelConfig, tp: TensorParallel) -> None:
        super().__init__()
        self.hidden, self.epsilon = config.hidden_size, config.layernorm_epsilon
        self.zero_centred = config.apply_layernorm_1p
        self.weight = tp.parameter(self.hidden, init="zeros" if self.zero_centred else "ones", decay=False)
        biased = self.has_bias and config.add_norm_bias
        self.bias = tp.parameter(self.hidden, init="zeros", decay=False) if biased else None

    def activation_bytes(self, shape: MicroBatchShape) -> ActivationBytes:
        """Return the bytes of its input."""
        return ActivationBytes(saved=shape.hidden_bytes)

    @property
    def gamma(self) -> Tensor:
        """The scale `[hidden]` of the normalised values."""
        return self.weight + 1.0 if self.zero_centred else self.weight


class LayerNorm(Norm):
    """Normalise to mean 0 and variance 1 (arXiv 1607.06450)."""

    has_bias = True

    def forward(self, x: Tensor) -> Tensor:
        """Return (x - mean) / sqrt(variance + epsilon) * gamma + bias, over the last dimension."""
        return F.layer_norm(x, (self.hidden,), self.gamma, self.bias, self.epsilon)  # [..., hidden]


class RMSNorm(Norm):
    """Normalise to mean square 1 (arXiv 1910.07467)."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x / sqrt(mean(x^2) + epsilon) * gamma, over the last dimension."""
        return F.rms_norm(x, (self.hidden,), self.gamma, self.epsilon)  # [..., hidden]


def make_norm(config: ModelConfig, tp: TensorParallel) -> nn.Module:
    """Return the normalisation that the configuration names."""
    norm: nn.Module = norm_class(config.normalization)(config, tp)
    return norm
