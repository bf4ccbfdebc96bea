"""Weights and gradients in contiguous memory.

All parameters that are treated alike lie behind one another in three flat tensors: the weights the model computes with,
their gradients, and the fp32 main weights (the weights themselves in an fp32 run). Parameters are views into them. So
the data-parallel reduction is one collective, zeroing is one kernel, and so is the optimizer's update.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megatron.parallel.spec import Shard, spec_of

ALIGN = 64  # elements: every parameter starts on a 256-byte line in fp32


class FlatBuffer:
    """Parameters of one kind in flat memory. Gradients are always accumulated and reduced in fp32.

    weights: compute dtype; grads, main: fp32, all `[length]`. `main is weights` in an fp32 run.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        self.offsets: list[int] = []
        length = 0
        for p in self.parameters:
            self.offsets.append(length)
            length += -(-p.numel() // ALIGN) * ALIGN
        example = self.parameters[0]
        self.weights = torch.zeros(length, dtype=example.dtype, device=example.device)
        self.grads = torch.zeros(length, dtype=torch.float32, device=example.device)
        for p, weight, grad in zip(self.parameters, self.views(self.weights), self.views(self.grads), strict=True):
            weight.copy_(p.detach())
            p.data = weight
            p.main_grad = grad  # type: ignore[attr-defined]  # for who adds to it without autograd
            if p.dtype == torch.float32:
                p.grad = grad  # autograd adds to it in place
            else:
                p.register_post_accumulate_grad_hook(_adder(grad))  # type: ignore[no-untyped-call]
        self.main = self.weights if example.dtype == torch.float32 else self.weights.float()

    def views(self, flat: Tensor) -> Iterator[Tensor]:
        """The parameters' places in a flat tensor, in their shapes."""
        for p, offset in zip(self.parameters, self.offsets, strict=True):
            yield flat[offset : offset + p.numel()].view(p.shape)

    def shards(self, flat: Tensor, prefix: str = "") -> Iterator[Shard]:
        """A flat tensor as a checkpoint sees it: one rectangle a parameter, without padding."""
        for p, view in zip(self.parameters, self.views(flat), strict=True):
            spec = spec_of(p)
            yield Shard(prefix + spec.name, spec.shape, spec.part, spec.split_over, spec.local(view))

    def publish(self) -> None:
        """Give the model the main weights, rounded to its dtype."""
        if self.main is not self.weights:
            self.weights.copy_(self.main)


def _adder(total: Tensor) -> Any:
    def add(parameter: Tensor) -> None:
        if parameter.grad is not None:
            total.add_(parameter.grad)
            parameter.grad = None

    return add


class Weights:
    """The model's weights as a checkpoint keeps them: fp32 main weights under global names."""

    def __init__(self, buffers: Sequence[FlatBuffer]) -> None:
        self._buffers = buffers

    def shards(self) -> Iterator[Shard]:
        for buffer in self._buffers:
            yield from buffer.shards(buffer.main)

    def scalars(self) -> dict[str, Any]:
        return {}

    def load_scalars(self, values: Mapping[str, Any]) -> None:
        """Called when the main weights were filled."""
        for buffer in self._buffers:
            buffer.publish()


def flat_buffers(parameters: Iterator[nn.Parameter]) -> list[FlatBuffer]:
    """Buffers for all parameters: those that decay, then those that do not."""
    held = list(parameters)
    kinds = [[p for p in held if spec_of(p).decay is decay] for decay in (True, False)]
    return [FlatBuffer(kind) for kind in kinds if kind]
