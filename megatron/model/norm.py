"""LayerNorm and RMSNorm over the last dimension."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.config.schema import ModelConfig
from megatron.parallel.linear import replicated
from megatron.parallel.spec import describe


class Norm(nn.Module):
    """`[..., hidden] -> [..., hidden]`; the kind, its bias and its epsilon come from the configuration.

    With apply_layernorm_1p the stored weight is gamma - 1.
    """

    def __init__(self, config: ModelConfig, *, sequence_parallel: bool) -> None:
        super().__init__()
        self.hidden, self.epsilon = config.size("hidden_size"), config.layernorm_epsilon
        self.rms, self.zero_centred = config.normalization == "RMSNorm", config.apply_layernorm_1p
        init = "zeros" if self.zero_centred else "ones"
        spec = replicated((self.hidden,), sequence_parallel, decay=False, init=init)
        self.weight = describe(nn.Parameter(torch.empty(self.hidden)), spec)
        self.bias = None
        if config.add_norm_bias and not self.rms:
            spec = replicated((self.hidden,), sequence_parallel, decay=False, init="zeros")
            self.bias = describe(nn.Parameter(torch.empty(self.hidden)), spec)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight + 1.0 if self.zero_centred else self.weight
        if self.rms:
            return F.rms_norm(x, (self.hidden,), weight, self.epsilon)
        return F.layer_norm(x, (self.hidden,), weight, self.bias, self.epsilon)
