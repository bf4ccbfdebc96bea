"""Linear layers cut over the tensor-parallel axis (arXiv 1909.08053, section 3).

    ColumnLinear   W = [W_0; W_1; ...] by output features: Y_r = X W_r^T            every rank gets all of X
    RowLinear      W = [W_0, W_1, ...] by input features:  Y = sum_r X_r W_r^T      every rank gets its slice of X

A ColumnLinear followed by a RowLinear needs one all-reduce forward and one backward. With sequence parallelism
(2205.05198) activations outside the pair are cut along the sequence, dimension 0: the all-reduce becomes a
reduce-scatter, and an all-gather stands before the ColumnLinear. Backward, the reduction of the input's gradient runs
while the weight's gradient is computed.

Weights are `[out_features, in_features]` as in torch. At size 1 both are `torch.nn.functional.linear`, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.mesh.mesh import Axis
from megatron.parallel.collectives import (
    Pending,
    reduce_from,
    scatter_sum,
    start_all_gather,
    start_all_reduce,
    start_reduce_scatter,
)
from megatron.parallel.spec import ParamSpec, Part, describe
from megatron.parallel.weight_grad import WeightWork, linear, weight_gradient


class _ColumnLinears(torch.autograd.Function):
    """Several column-parallel products of one input: one gather forward, one reduction backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        axis: Axis,
        sequence_parallel: bool,
        work: WeightWork | None,
        count: int,
        *parameters: Tensor | None,
    ) -> tuple[Tensor, ...]:
        weights, biases = parameters[:count], parameters[count:]
        whole = start_all_gather(x, axis).wait() if sequence_parallel else x
        # Under sequence parallelism only the shard is kept, and gathered again backward: 1/tp of the memory.
        ctx.save_for_backward(x, *weights)
        ctx.axis, ctx.sequence_parallel, ctx.work = axis, sequence_parallel, work
        ctx.weights, ctx.biases = weights, biases
        return tuple(F.linear(whole, w, b) for w, b in zip(weights, biases, strict=True))  # type: ignore[arg-type]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        gathering = start_all_gather(x, ctx.axis) if ctx.sequence_parallel else Pending(None, lambda: x)
        grad_x = grads[0].matmul(weights[0])
        for grad, weight in zip(grads[1:], weights[1:], strict=True):
            grad_x = grad_x + grad.matmul(weight)
        whole = gathering.wait()
        reduce = start_reduce_scatter if ctx.sequence_parallel else start_all_reduce
        reducing = reduce(grad_x, ctx.axis)
        if ctx.work is not None and ctx.work.keeping:
            for weight, bias, grad in zip(ctx.weights, ctx.biases, grads, strict=True):
                ctx.work.keep(weight, bias, whole, grad)
            return reducing.wait(), *[None] * (4 + 2 * len(grads))
        rows = whole.flatten(0, -2)
        flat = [g.flatten(0, -2) for g in grads]
        fused = ctx.work is not None and ctx.work.fused
        grad_weights = [weight_gradient(w, g, rows, fused=fused) for w, g in zip(ctx.weights, flat, strict=True)]
        grad_biases = [None if b is None else g.sum(0) for g, b in zip(flat, ctx.biases, strict=True)]
        return reducing.wait(), None, None, None, None, *grad_weights, *grad_biases


class ColumnLinear(nn.Module):
    """`[..., in_features] -> [..., out_features / tp]`; this rank holds rows `rank * out / tp` and on.

    sequence_parallel: the input is this rank's slice `[seq / tp, ...]`, the output is whole in the sequence.
    ValueError when the axis does not divide out_features.
    """

    def __init__(self, in_features: int, out_features: int, tp: Axis, *, bias: bool, sequence_parallel: bool = False) -> None:
        super().__init__()
        if out_features % tp.size:
            raise ValueError(f"{out_features} output features do not divide over {tp.size} tensor-parallel ranks")
        local = out_features // tp.size
        self.tp, self.sequence_parallel = tp, sequence_parallel and tp.size > 1
        self.weight_work: WeightWork | None = None
        self.weight = describe(
            nn.Parameter(torch.empty(local, in_features)),
            ParamSpec("", (out_features, in_features), Part((tp.rank * local, 0), (local, in_features)), frozenset({"tp"})),
        )
        self.bias = None
        if bias:
            part = Part((tp.rank * local,), (local,))
            spec = ParamSpec("", (out_features,), part, frozenset({"tp"}), decay=False, init="zeros")
            self.bias = describe(nn.Parameter(torch.empty(local)), spec)

    def forward(self, x: Tensor) -> Tensor:
        return column_linears(x, [self])[0]


def column_linears(x: Tensor, layers: Sequence[ColumnLinear]) -> tuple[Tensor, ...]:
    """The outputs of several ColumnLinears that share the input: one communication instead of one for each."""
    first = layers[0]
    weights, biases = [y.weight for y in layers], [y.bias for y in layers]
    return column_products(x, first.tp, first.sequence_parallel, weights, biases, first.weight_work)


def column_products(
    x: Tensor,
    tp: Axis,
    sequence_parallel: bool,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    work: WeightWork | None = None,
) -> tuple[Tensor, ...]:
    """`x W^T + b` for weights cut over tp by their rows; what `ColumnLinear` and the output layer compute."""
    if tp.size == 1:
        return tuple(linear(x, w, b, work) for w, b in zip(weights, biases, strict=True))
    arguments = (x, tp, sequence_parallel, work, len(weights), *weights, *biases)
    outputs: tuple[Tensor, ...] = _ColumnLinears.apply(*arguments)  # type: ignore[no-untyped-call]
    return outputs


class RowLinear(nn.Module):
    """`[..., in_features / tp] -> [..., out_features]`; this rank holds columns `rank * in / tp` and on.

    The bias is whole on every rank and added once, after the sum. sequence_parallel: the output is this rank's slice
    `[seq / tp, ...]`, so each rank's bias gradient is a part of the sum. ValueError when the axis does not divide
    in_features.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        tp: Axis,
        *,
        bias: bool,
        sequence_parallel: bool = False,
        init: str = "normal",
    ) -> None:
        super().__init__()
        if in_features % tp.size:
            raise ValueError(f"{in_features} input features do not divide over {tp.size} tensor-parallel ranks")
        local = in_features // tp.size
        self.tp, self.sequence_parallel = tp, sequence_parallel and tp.size > 1
        self.weight_work: WeightWork | None = None
        part = Part((0, tp.rank * local), (out_features, local))
        self.weight = describe(
            nn.Parameter(torch.empty(out_features, local)),
            ParamSpec("", (out_features, in_features), part, frozenset({"tp"}), init=init),
        )
        self.bias = None
        if bias:
            spec = replicated((out_features,), self.sequence_parallel, decay=False, init="zeros")
            self.bias = describe(nn.Parameter(torch.empty(out_features)), spec)

    def forward(self, x: Tensor) -> Tensor:
        if self.tp.size == 1:
            return linear(x, self.weight, self.bias, self.weight_work)
        partial = linear(x, self.weight, None, self.weight_work)
        y = scatter_sum(partial, self.tp, 0) if self.sequence_parallel else reduce_from(partial, self.tp)
        return y if self.bias is None else y + self.bias


def replicated(shape: tuple[int, ...], sequence_parallel: bool, *, decay: bool, init: str) -> ParamSpec:
    """The spec of a parameter that every tensor-parallel rank holds whole.

    Where it meets only this rank's slice of the sequence, its gradients must be summed over tp.
    """
    axes = frozenset({"tp"}) if sequence_parallel else frozenset[str]()
    return ParamSpec("", shape, Part.whole(shape), sum_grad_over=axes, decay=decay, init=init)
