"""Weight gradients of linear layers: made with the input's gradient, or deferred to a W action (zero bubble, arXiv 2401.10241).

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


def add_weight_grad(total: Tensor, rows: Tensor, x: Tensor) -> None:
    """Add the weight gradient `rows^T x` to `total` within the product. CUDA alone can.

    Args:
        total: fp32 `[out, in]`.
        rows: 16 bit `[tokens, out]`, the gradient of the output.
        x: the same dtype `[tokens, in]`, the input.
    """
    torch.addmm(total, rows.t(), x, out_dtype=torch.float32, out=total)


def supports_fused_weight_grad(device: torch.device) -> bool:
    """Return whether `add_weight_grad` works on a device.

    Older torch takes no fp32 sum beside 16-bit factors, and a CPU has no such product.
    """
    if device.type != "cuda":
        return False
    total, factor = torch.zeros(16, 16, device=device), torch.ones(16, 16, dtype=torch.bfloat16, device=device)
    try:
        add_weight_grad(total, factor, factor)
    except (RuntimeError, TypeError):
        return False
    return bool((total == 16.0).all())


def compute_weight_grad(weight: nn.Parameter, rows: Tensor, x: Tensor, *, fused: bool) -> Tensor | None:
    """Return the gradient of a weight, not added to anything yet; None where it was added to the buffer already.

    Args:
        weight: `[out, in]`.
        rows: `[tokens, out]`, the gradient of the output.
        x: `[tokens, in]`, the input.
        fused: add it within the product, if the weight has 16 bit and an fp32 buffer.

    Returns:
        `[out, in]`, or None.
    """
    total: Tensor | None = getattr(weight, "main_grad", None)
    if not fused or total is None or total.dtype != torch.float32 or weight.dtype == torch.float32:
        return rows.t().matmul(x)  # [out, in]
    add_weight_grad(total, rows, x)
    run_grad_ready_hook(weight)  # autograd will not, since it gets no gradient
    return None


@dataclass(frozen=True)
class DeferredWeightGrad:
    """The gradients of a weight `[out, in]` and of its bias `[out]`, not yet made.

    x: the layer's input, `[..., in]`.
    grad: the gradient of its output, `[..., out]`.
    fused: as for `compute_weight_grad`.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    x: Tensor
    grad: Tensor
    fused: bool = False

    @torch.no_grad()
    def run(self) -> None:
        """Make them, and add them to the parameters' gradients."""
        rows = self.grad.flatten(0, -2)  # [tokens, out]
        made = compute_weight_grad(self.weight, rows, self.x.flatten(0, -2), fused=self.fused)
        if made is not None:
            accumulate(self.weight, made)
        if self.bias is not None:
            accumulate(self.bias, rows.sum(0))


class WeightGradStore:
    """Deferred weight gradients of the linear layers of a rank's stages.

    The layers put them here while `deferring` is open, else they make them at once.

    fused: add gradients to fp32 buffers within the product; only where `supports_fused_weight_grad`.
    """

    def __init__(self, *, fused: bool = False) -> None:
        self.fused = fused
        self._deferred: list[DeferredWeightGrad] | None = None

    @property
    def is_deferring(self) -> bool:
        """True while weight gradients are deferred."""
        return self._deferred is not None

    def put(self, weight: nn.Parameter, bias: nn.Parameter | None, x: Tensor, grad: Tensor) -> None:
        """Put the factors of a weight's gradient aside, for later.

        Args:
            weight: `[out, in]`.
            bias: `[out]`, or None.
            x: the layer's input, `[..., in]`.
            grad: the gradient of its output, `[..., out]`.

        Raises:
            RuntimeError: outside of `deferring`.
        """
        if self._deferred is None:
            raise RuntimeError("no backward pass is keeping its weight products")
        # Detached, so that the graph behind them is free to go.
        self._deferred.append(DeferredWeightGrad(weight, bias, x.detach(), grad.detach(), self.fused))

    @contextmanager
    def deferring(self) -> Iterator[list[DeferredWeightGrad]]:
        """Open a list in which a backward pass inside leaves its weight gradients."""
        deferred: list[DeferredWeightGrad] = []
        self._deferred = deferred
        try:
            yield deferred
        finally:
            self._deferred = None


class _Linear(torch.autograd.Function):
    """`F.linear` whose weight gradient can be deferred, or added to the buffer at once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: nn.Parameter, bias: nn.Parameter | None, store: WeightGradStore) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.bias, ctx.store = weight, bias, store
        return F.linear(x, weight, bias)  # [..., out]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x,), grad = ctx.saved_tensors, grads[0]  # [..., in], [..., out]
        grad_x = grad.matmul(ctx.weight)  # [..., in]
        if ctx.store.is_deferring:
            ctx.store.put(ctx.weight, ctx.bias, x, grad)
            return grad_x, None, None, None
        rows = grad.flatten(0, -2)  # [tokens, out]
        grad_bias = None if ctx.bias is None else rows.sum(0)  # [out]
        return grad_x, compute_weight_grad(ctx.weight, rows, x.flatten(0, -2), fused=ctx.store.fused), grad_bias, None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, store: WeightGradStore | None) -> Tensor:
    """Return `x weight^T + bias`; torch's own, unless a store decides when the weight's gradient is made.

    Args:
        x: `[..., in]`.
        weight: `[out, in]`.
        bias: `[out]`, or None.
        store: takes the weight's gradient while it defers; None for autograd's way.

    Returns:
        `[..., out]`.
    """
    if store is None:
        return F.linear(x, weight, bias)
    y: Tensor = _Linear.apply(x, weight, bias, store)  # type: ignore[no-untyped-call]
    return y


def attach_weight_grad_store(module: nn.Module, store: WeightGradStore) -> None:
    """Let `store` decide when every parallel linear layer of `module` makes its weight gradient."""
    for layer in module.modules():
        if hasattr(layer, "weight_grad_store"):
            layer.weight_grad_store = store  # type: ignore[assignment]  # a plain attribute of ours
