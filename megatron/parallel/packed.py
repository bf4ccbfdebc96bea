"""Weights arranged for the CPU's matrix products, for models that only generate.

oneDNN's products of a few rows read a weight in blocks; `torch.nn.functional.linear` either rearranges it in every call or
takes slower products. Here a copy of it is rearranged once. For a single row no copy is read, since all that counts then is
memory's bandwidth, but products are faster where the weight lies in memory column by column.
"""

from __future__ import annotations

import functools
import platform

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROWS = 64  # of the products for which weights are packed, as a hint


class PackedWeight:
    """A copy of a weight `[out, in]` in the layout of oneDNN."""

    def __init__(self, weight: Tensor) -> None:
        self._packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return `x weight^T + bias`, `[..., out]`, of x `[..., in]`. Without gradients."""
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, bias, "none", [], "")
        return y


@functools.cache
def supports_packed_weights(dtype: torch.dtype) -> bool:
    """Return whether weights of a dtype can be packed here: torch's operators for it are not the same in all versions."""
    available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if platform.machine() not in ("x86_64", "AMD64") or not available:
        return False
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(n, 64, generator=generator).to(dtype) for n in (96, 3))
    bias = weight[:, 0].contiguous()
    try:
        found = PackedWeight(weight).product(x, bias)
    except (RuntimeError, AttributeError, TypeError):
        return False
    return torch.allclose(found, F.linear(x, weight, bias), rtol=1e-2, atol=1e-3 if dtype == torch.float32 else 1e-1)


def pack_weight(weight: nn.Parameter) -> None:
    """Let products without gradients use a packed copy of a weight `[out, in]`, where there can be one."""
    if weight.device.type == "cpu" and supports_packed_weights(weight.dtype):
        weight.packed = PackedWeight(weight)  # type: ignore[attr-defined]


def order_by_columns(weight: nn.Parameter) -> None:
    """Lay a weight `[out, in]` out in memory column by column; its values and its shape stay."""
    if weight.device.type == "cpu":
        weight.data = weight.data.t().contiguous().t()


def packed_weight(x: Tensor, weight: Tensor) -> PackedWeight | None:
    """Return the packed copy of `weight` if the product with x `[..., in]` is faster with it: with more than one row."""
    packed: PackedWeight | None = getattr(weight, "packed", None)
    if packed is None or x.numel() == x.shape[-1] or torch.is_grad_enabled():
        return None
    return packed
