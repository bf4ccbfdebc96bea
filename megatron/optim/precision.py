"""Number formats of a run: the dtypes of computation and gradients, and the loss scale.

    computation         fp32, bf16 or fp16   weights, activations and their gradients, transfers between stages
    sums of gradients   fp32 or bf16         over micro-batches and ranks; bf16 only with bf16 weights and if configured
    always fp32                              main weights, the optimizer's moments, statistics of norms and softmax, the loss,
                                             rotary angles, gradient norms

bf16 has fp32's range in half the bytes and needs no loss scale; fp16 has more digits but a narrow range, and needs one
(arXiv 1710.03740). A constant loss scale can be configured with any format, as in Megatron-LM.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron.config.schema import PrecisionConfig
from megatron.optim.scaler import ConstantScaler, DynamicScaler, Scaler


@dataclass(frozen=True)
class Precision:
    """Number formats of a run. Tensors not listed here are fp32.

    compute: dtype of the model's weights and activations.
    gradients: dtype in which gradients are accumulated and reduced.
    config: settings of the loss scale.
    """

    compute: torch.dtype
    gradients: torch.dtype
    config: PrecisionConfig

    @classmethod
    def from_config(cls, config: PrecisionConfig) -> Precision:
        """Return the number formats of a validated configuration."""
        compute = torch.float16 if config.fp16 else torch.bfloat16 if config.bf16 else torch.float32
        return cls(compute, torch.bfloat16 if config.grad_reduce_in_bf16 else torch.float32, config)

    def scaler(self) -> Scaler:
        """Return a new loss scaler in its initial state."""
        config = self.config
        if config.loss_scale:
            return ConstantScaler(config.loss_scale)
        if not config.fp16:
            return ConstantScaler()
        return DynamicScaler(config.initial_loss_scale, config.min_loss_scale, config.loss_scale_window, config.hysteresis)
