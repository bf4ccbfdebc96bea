"""What becomes of a linear layer's weight gradient: made with the input's, or kept for a W action (arXiv 2401.10241).

A zero-bubble schedule runs the backward pass of a stage in two parts: I makes the gradient of the input, which another
stage waits for; W makes the gradients of the weights, any time later. In I the linear layers therefore put the two factors
of their weight's gradient aside, `grad^T` and the input, and W is nothing but the products.

On a GPU the product of 16-bit factors can add itself to the fp32 gradient: it is summed in fp32 anyway, and so it is neither
rounded to 16 bit nor written and read again (gradient accumulation fusion). Autograd then gets no gradient of the weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.parallel.spec import accumulate, run_grad_ready_hook


def add_product(total: Tensor, rows: Tensor, x: Tensor) -> None:
    """Add `rows^T x` to `total`, fp32 `[out, in]`, within the product. CUDA alone can.

    rows: 16 bit `[tokens, out]`. x: the same dtype `[tokens, in]`.
    """
    torch.addmm(total, rows.t(), x, out_dtype=torch.float32, out=total)


def can_add_products(device: torch.device) -> bool:
    """Whether `add_product` works there: older torch takes no fp32 sum beside 16-bit factors, and a CPU has no such product."""
    if device.type != "cuda":
        return False
    total, factor = torch.zeros(16, 16, device=device), torch.ones(16, 16, dtype=torch.bfloat16, device=device)
    try:
        add_product(total, factor, factor)
    except (RuntimeError, TypeError):
        return False
    return bool((total == 16.0).all())


def weight_gradient(weight: nn.Parameter, rows: Tensor, x: Tensor, *, fused: bool) -> Tensor | None:
    """The gradient of a weight `[out, in]`, not added to anything yet; None where it was added to the buffer already.

    rows: `[tokens, out]`, the gradient of the output. x: `[tokens, in]`. fused: add it within the product, if the weight has
    16 bit and an fp32 buffer.
    """
    total: Tensor | None = getattr(weight, "main_grad", None)
    if not fused or total is None or total.dtype != torch.float32 or weight.dtype == torch.float32:
        return rows.t().matmul(x)
    add_product(total, rows, x)
    run_grad_ready_hook(weight)
    return None


@dataclass(frozen=True)
class WeightProduct:
    """The gradients of a weight `[out, in]` and of its bias `[out]`, not yet made.

    x: `[..., in]`, the layer's input. grad: `[..., out]`, the gradient of its output. fused: as for `weight_gradient`.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    x: Tensor
    grad: Tensor
    fused: bool = False

    @torch.no_grad()
    def run(self) -> None:
        """Make them, and add them to the parameters' gradients."""
        rows = self.grad.flatten(0, -2)
        made = weight_gradient(self.weight, rows, self.x.flatten(0, -2), fused=self.fused)
        if made is not None:
            accumulate(self.weight, made)
        if self.bias is not None:
            accumulate(self.bias, rows.sum(0))


class WeightWork:
    """What the linear layers of a rank's stages do with their weight products: put them here while `kept` is open, else
    make them at once. fused: add them to fp32 gradients within the product; only where `can_add_products`."""

    def __init__(self, *, fused: bool = False) -> None:
        self.fused = fused
        self._products: list[WeightProduct] | None = None

    @property
    def keeping(self) -> bool:
        """Whether weight gradients are put off now."""
        return self._products is not None

    def keep(self, weight: nn.Parameter, bias: nn.Parameter | None, x: Tensor, grad: Tensor) -> None:
        """Put the factors aside. Only while `keeping`."""
        if self._products is None:
            raise RuntimeError("no backward pass is keeping its weight products")
        # Detached, so that the graph behind them is free to go.
        self._products.append(WeightProduct(weight, bias, x.detach(), grad.detach(), self.fused))

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
    """`F.linear` whose weight gradient can be kept for later, or added to the buffer at once."""

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
        return grad_x, weight_gradient(ctx.weight, rows, x.flatten(0, -2), fused=ctx.work.fused), grad_bias, None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, work: WeightWork | None) -> Tensor:
    """`x weight^T + bias`: torch's own, unless somebody has a say in what becomes of the weight's gradient."""
    if work is None:
        return F.linear(x, weight, bias)
    y: Tensor = _Linear.apply(x, weight, bias, work)  # type: ignore[no-untyped-call]
    return y


def manage_weight_gradients(module: nn.Module, work: WeightWork) -> None:
    """Let `work` say what every parallel linear layer of `module` does with its weight products."""
    for layer in module.modules():
        if hasattr(layer, "weight_work"):
            layer.weight_work = work  # type: ignore[assignment]  # a plain attribute of ours
