"""LayerNorm and RMSNorm over the last dimension."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from megatron.config.schema import ModelConfig
from megatron.parallel.tensor_parallel import TensorParallel


class Norm(nn.Module):
    """`[..., hidden] -> [..., hidden]`; the kind, its bias and its epsilon come from the configuration.

    With apply_layernorm_1p the stored weight is gamma - 1.
    """

    def __init__(self, config: ModelConfig, tp: TensorParallel) -> None:
        super().__init__()
        self.hidden, self.epsilon = config.size("hidden_size"), config.layernorm_epsilon
        self.rms, self.zero_centred = config.normalization == "RMSNorm", config.apply_layernorm_1p
        self.weight = tp.parameter(self.hidden, init="zeros" if self.zero_centred else "ones", decay=False)
        self.bias = None
        if config.add_norm_bias and not self.rms:
            self.bias = tp.parameter(self.hidden, init="zeros", decay=False)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight + 1.0 if self.zero_centred else self.weight
        if self.rms:
            return F.rms_norm(x, (self.hidden,), weight, self.epsilon)
        return F.layer_norm(x, (self.hidden,), weight, self.bias, self.epsilon)
