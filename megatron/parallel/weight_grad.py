"""Weight gradients of linear layers, computed at once or deferred to a W action (zero bubble, arXiv 2401.10241).

A zero-bubble schedule splits the backward pass of a stage into two actions. I computes the gradient of the input, which another
stage waits for; W computes the gradients of the weights, at any later time. So in I the linear layers store the two factors of
their weight's gradient, the output's gradient and the input, and W multiplies them.

On a GPU, the matrix multiplication of 16-bit factors can itself add to the fp32 gradient, so that the product is neither
rounded to 16 bit nor written and read again (gradient accumulation fusion). Autograd then receives no weight gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.parallel.packed import packed_weight
from megatron.parallel.spec import accumulate, run_grad_ready_hook


def add_weight_grad(total: Tensor, rows: Tensor, x: Tensor) -> None:
    """Add the weight gradient `rows^T x` to `total` within the matrix multiplication. CUDA only.

    Args:
        total: fp32 `[out, in]`.
        rows: 16 bit `[tokens, out]`, the gradient of the output.
        x: the same dtype `[tokens, in]`, the input.
    """
    torch.addmm(total, rows.t(), x, out_dtype=torch.float32, out=total)


def supports_fused_weight_grad(device: torch.device) -> bool:
    """Return whether `add_weight_grad` works on a device.

    Older versions of torch do not accept an fp32 sum with 16-bit factors, and CPUs do not support it.
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
    """Return the gradient of a weight for the caller to add; None if it was already added to the gradient buffer.

    Args:
        weight: `[out, in]`.
        rows: `[tokens, out]`, the gradient of the output.
        x: `[tokens, in]`, the input.
        fused: add it within the product, if the weight is 16-bit and has an fp32 gradient buffer.

    Returns:
        `[out, in]`, or None.
    """
    total: Tensor | None = getattr(weight, "main_grad", None)
    if not fused or total is None or total.dtype != torch.float32 or weight.dtype == torch.float32:
        return rows.t().matmul(x)  # [out, in]
    add_weight_grad(total, rows, x)
    run_grad_ready_hook(weight)  # autograd does not call it, since it gets no gradient
    return None


@dataclass(frozen=True)
class DeferredWeightGrad:
    """The factors from which the gradients of a weight and its bias will be computed.

    Attributes:
        weight: `[out, in]`.
        bias: `[out]`, or None.
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
        """Compute the gradients, and add them to the parameters' gradients."""
        rows = self.grad.flatten(0, -2)  # [tokens, out]
        grad_weight = compute_weight_grad(self.weight, rows, self.x.flatten(0, -2), fused=self.fused)  # [out, in], or None
        if grad_weight is not None:
            accumulate(self.weight, grad_weight)
        if self.bias is not None:
            accumulate(self.bias, rows.sum(0))  # [out]


class WeightGradStore:
    """Deferred weight gradients of the linear layers of a rank's stages.

    Inside a `deferring` block the layers store the factors here; outside, they compute the gradients at once.

    Args:
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
        """Store the factors of a weight's gradient for later.

        Args:
            weight: `[out, in]`.
            bias: `[out]`, or None.
            x: the layer's input, `[..., in]`.
            grad: the gradient of its output, `[..., out]`.

        Raises:
            RuntimeError: outside of `deferring`.
        """
        if self._deferred is None:
            raise RuntimeError("weight gradients can be stored only inside a `deferring` block")
        # Detached, so that their graph can be freed.
        self._deferred.append(DeferredWeightGrad(weight, bias, x.detach(), grad.detach(), self.fused))

    @contextmanager
    def deferring(self) -> Iterator[list[DeferredWeightGrad]]:
        """Defer the weight gradients of a backward pass inside the block to the list that is yielded."""
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
    """Return `x weight^T + bias`, by torch's own function unless there is a store for the weight's gradient.

    Args:
        x: `[..., in]`.
        weight: `[out, in]`.
        bias: `[out]`, or None.
        store: can defer or fuse the weight's gradient; None leaves it to autograd.

    Returns:
        `[..., out]`.
    """
    if (packed := packed_weight(x, weight)) is not None:
        return packed.product(x, bias)  # [..., out]
    if store is None:
        return F.linear(x, weight, bias)  # [..., out]
    y: Tensor = _Linear.apply(x, weight, bias, store)  # type: ignore[no-untyped-call]  # [..., out]
    return y


def attach_weight_grad_store(module: nn.Module, store: WeightGradStore) -> None:
    """Make `store` the weight-gradient store of every parallel linear layer of `module`."""
    for layer in module.modules():
        if hasattr(layer, "weight_grad_store"):
            layer.weight_grad_store = store  # type: ignore[assignment]  # a plain attribute of ours
