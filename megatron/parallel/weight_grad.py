"""What becomes of a linear layer's weight gradient: made with the input's, or kept for a W action (arXiv 2401.10241).

A zero-bubble schedule runs the backward pass of a stage in two parts: I makes the gradient of the input, which another
stage waits for; W makes the gradients of the weights, any time later. In I the linear layers therefore put the two factors
of their weight's gradient aside, `grad^T` and the input, and W is nothing but the products.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.parallel.spec import accumulate


@dataclass(frozen=True)
class WeightProduct:
    """The gradients of a weight `[out, in]` and of its bias `[out]`, not yet made.

    x: `[..., in]`, the layer's input. grad: `[..., out]`, the gradient of its output.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    x: Tensor
    grad: Tensor

    @torch.no_grad()
    def run(self) -> None:
        """Make them, and add them to the parameters' gradients."""
        rows = self.grad.flatten(0, -2)
        accumulate(self.weight, rows.t().matmul(self.x.flatten(0, -2)))
        if self.bias is not None:
            accumulate(self.bias, rows.sum(0))


class WeightWork:
    """Where the linear layers of a rank's stages put their weight products while `kept` is open."""

    def __init__(self) -> None:
        self._products: list[WeightProduct] | None = None

    @property
    def keeping(self) -> bool:
        return self._products is not None

    def keep(self, weight: nn.Parameter, bias: nn.Parameter | None, x: Tensor, grad: Tensor) -> None:
        """Put the factors aside. Only while `keeping`."""
        if self._products is None:
            raise RuntimeError("no backward pass is keeping its weight products")
        self._products.append(WeightProduct(weight, bias, x.detach(), grad.detach()))  # the graph behind them is free to go

    @contextmanager
    def kept(self) -> Iterator[list[WeightProduct]]:
        """A backward pass inside leaves its weight products in the list."""
        products: list[WeightProduct] = []
        self._products = products
        try:
            yield products
        finally:
            self._products = None


class _Linear(torch.autograd.Function):
    """`F.linear` whose weight gradient can be kept for later."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: nn.Parameter, bias: nn.Parameter | None, work: WeightWork) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.bias, ctx.work = weight, bias, work
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x,), grad = ctx.saved_tensors, grads[0]
        grad_x = grad.matmul(ctx.weight)
        if ctx.work.keeping:
            ctx.work.keep(ctx.weight, ctx.bias, x, grad)
            return grad_x, None, None, None
        rows = grad.flatten(0, -2)
        grad_bias = None if ctx.bias is None else rows.sum(0)
        return grad_x, rows.t().matmul(x.flatten(0, -2)), grad_bias, None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, work: WeightWork | None) -> Tensor:
    """`x weight^T + bias`: torch's own, unless the weight's gradient may have to wait."""
    if work is None:
        return F.linear(x, weight, bias)
    y: Tensor = _Linear.apply(x, weight, bias, work)  # type: ignore[no-untyped-call]
    return y


def split_weight_gradients(module: nn.Module, work: WeightWork) -> None:
    """Let every parallel linear layer of `module` keep its weight products in `work`."""
    for layer in module.modules():
        if hasattr(layer, "weight_work"):
            layer.weight_work = work  # type: ignore[assignment]  # a plain attribute of ours
