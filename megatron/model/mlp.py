"""The MLP of a layer: up projection, activation, down projection (arXiv 1909.08053, section 3)."""

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
    """Return relu(x)^2 (arXiv 2109.08668)."""
    return F.relu(x).square()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": partial(F.gelu, approximate="tanh"),  # GPT-2's; arXiv 1606.08415
    "gelu-exact": F.gelu,
    "squared-relu": squared_relu,
    "swiglu": F.silu,  # applied to the gate; arXiv 2002.05202
}


class MLP(nn.Module):
    """MLP, `[seq, batch, hidden] -> [seq, batch, hidden]`: down(act(up(x))), or with SwiGLU down(silu(gate(x)) * up(x)).

    Gate and up are separate weights, so that each rank's shard of either is one rectangle.
    """

    def __init__(self, config: ModelConfig, tp: TensorParallel) -> None:
        super().__init__()
        hidden, ffn_hidden, bias = config.hidden_size, config.ffn_hidden_size, config.add_bias_linear
        self.activation = ACTIVATIONS[config.activation]
        self.gate = None
        if config.activation == "swiglu":
            self.gate = ColumnLinear(hidden, ffn_hidden, tp, bias=bias, same_input=True)
        self.up = ColumnLinear(hidden, ffn_hidden, tp, bias=bias)
        self.down = RowLinear(ffn_hidden, hidden, tp, bias=bias, init="output")

    def activation_bytes(self, shape: MicroBatchShape) -> ActivationBytes:
        """Return the bytes of the activation's input; with a gate, also those of the two factors of the product."""
        tensors = 1 if self.gate is None else 3
        return ActivationBytes(saved=tensors * shape.element * shape.tokens * self.up.weight.shape[0])

    def forward(self, x: Tensor) -> Tensor:
        """Map `[seq, batch, hidden]` to the same shape, each token by itself."""
        if self.gate is None:
            y = self.activation(self.up(x))  # [seq, batch, ffn_hidden / tp]
            return self.down(y)  # type: ignore[no-any-return]  # [seq, batch, hidden]
        gate, up = column_linears(x, [self.gate, self.up])  # each [seq, batch, ffn_hidden / tp]
        return self.down(self.activation(gate) * up)  # type: ignore[no-any-return]  # [seq, batch, hidden]
