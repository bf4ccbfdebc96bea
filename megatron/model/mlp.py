"""The feed-forward half of a layer: up, activation, down (arXiv 1909.08053, section 3)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from megatron.config.schema import ModelConfig
from megatron.parallel.cost import ActivationBytes, MicroBatchShape
from megatron.parallel.linear import ColumnLinear, RowLinear, column_linears
from megatron.parallel.tensor_parallel import TensorParallel


def squared_relu(x: Tensor) -> Tensor:
    """relu(x)^2 (arXiv 2109.08668)."""
    return F.relu(x).square()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": partial(F.gelu, approximate="tanh"),
    "gelu-exact": F.gelu,
    "squared-relu": squared_relu,
    "swiglu": F.silu,  # of the gate; arXiv 2002.05202
}


class MLP(nn.Module):
    """`[seq, batch, hidden] -> [seq, batch, hidden]`. Gate and up are two weights, so each shard is one rectangle."""

    def __init__(self, config: ModelConfig, tp: TensorParallel) -> None:
        super().__init__()
        hidden, ffn, bias = config.hidden_size, config.ffn_hidden_size, config.add_bias_linear
        self.activation = ACTIVATIONS[config.activation]
        self.gate = None
        if config.activation == "swiglu":
            self.gate = ColumnLinear(hidden, ffn, tp, bias=bias, same_input=True)
        self.up = ColumnLinear(hidden, ffn, tp, bias=bias)
        self.down = RowLinear(ffn, hidden, tp, bias=bias, init="output")

    def activation_bytes(self, shape: MicroBatchShape) -> ActivationBytes:
        """Return the bytes of what the activation takes; with a gate also of its own output and of what that multiplies."""
        tensors = 1 if self.gate is None else 3
        return ActivationBytes(saved=tensors * shape.element * shape.tokens * self.up.weight.shape[0])

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is None:
            return self.down(self.activation(self.up(x)))  # type: ignore[no-any-return]
        gate, up = column_linears(x, [self.gate, self.up])
        return self.down(self.activation(gate) * up)  # type: ignore[no-any-return]
