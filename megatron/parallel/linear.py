"""Linear layers whose weights are divided over the tensor-parallel axis (arXiv 1909.08053, section 3).

    ColumnLinear   W = [W_0; W_1; ...] by output features: Y_r = X W_r^T            every rank gets all of X
    RowLinear      W = [W_0, W_1, ...] by input features:  Y = sum_r X_r W_r^T      every rank gets its slice of X

A ColumnLinear followed by a RowLinear needs one all-reduce in the forward pass and one in the backward pass. With sequence
parallelism (2205.05198), activations outside the pair are divided along the sequence, dimension 0: the all-reduce becomes a
reduce-scatter, and an all-gather precedes the ColumnLinear. In the backward pass, the reduction of the input's gradient
overlaps with the computation of the weight's gradient.

Weights are `[out_features, in_features]` as in torch. On one rank both layers are bit-equal to `torch.nn.functional.linear`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.parallel.cost import ActivationBytes, Flops, MicroBatchShape, weight_flops
from megatron.parallel.spec import Part
from megatron.parallel.tensor_parallel import TensorParallel
from megatron.parallel.weight_grad import WeightGradStore, compute_weight_grad, linear


class _ColumnLinears(torch.autograd.Function):
    """Several column-parallel products of one input, with one gather in the forward pass and one reduction in the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        tp: TensorParallel,
        store: WeightGradStore | None,
        count: int,
        *parameters: Tensor | None,
    ) -> tuple[Tensor, ...]:
        # x: [seq, ..., in], or [seq / tp, ..., in] under sequence parallelism; weights: [out / tp, in].
        weights, biases = parameters[:count], parameters[count:]
        whole = tp.enter_async(x).wait()  # [seq, ..., in]
        # Under sequence parallelism only this rank's slice is saved, 1/tp of the memory; the backward pass gathers it again.
        ctx.save_for_backward(x, *weights)
        ctx.tp, ctx.store = tp, store
        ctx.weights, ctx.biases = weights, biases
        # Each output is [seq, ..., out / tp].
        return tuple(F.linear(whole, w, b) for w, b in zip(weights, biases, strict=True))  # type: ignore[arg-type]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        gathering = ctx.tp.enter_async(x)  # overlaps with the products for the input's gradient
        grad_x = grads[0].matmul(weights[0])  # [seq, ..., in], this rank's part of a sum
        for grad, weight in zip(grads[1:], weights[1:], strict=True):
            grad_x = grad_x + grad.matmul(weight)  # [seq, ..., in]
        whole = gathering.wait()  # [seq, ..., in]
        reducing = ctx.tp.leave_async(grad_x)  # overlaps with the products for the weights' gradients
        if ctx.store is not None and ctx.store.is_deferring:
            for weight, bias, grad in zip(ctx.weights, ctx.biases, grads, strict=True):
                ctx.store.put(weight, bias, whole, grad)
            return reducing.wait(), *[None] * (3 + 2 * len(grads))
        rows = whole.flatten(0, -2)  # [tokens, in]
        flat = [g.flatten(0, -2) for g in grads]  # each [tokens, out / tp]
        fused = ctx.store is not None and ctx.store.fused
        # Each weight gradient is [out / tp, in], each bias gradient [out / tp].
        grad_weights = [compute_weight_grad(w, g, rows, fused=fused) for w, g in zip(ctx.weights, flat, strict=True)]
        grad_biases = [None if b is None else g.sum(0) for g, b in zip(flat, ctx.biases, strict=True)]
        return reducing.wait(), None, None, None, *grad_weights, *grad_biases


class ColumnLinear(nn.Module):
    """Linear layer `[..., in_features] -> [..., out_features / tp]`; this rank has out / tp rows from `rank * out / tp`.

    Under sequence parallelism the input is this rank's slice `[seq / tp, ...]`, and the output covers the whole sequence.
    ValueError when the axis does not divide out_features.
    """

    def __init__(
        self, in_features: int, out_features: int, tp: TensorParallel, *, bias: bool, same_input: bool = False
    ) -> None:
        """Create the layer.

        Args:
            in_features: number of input features.
            out_features: number of output features over all ranks.
            tp: the tensor-parallel ranks.
            bias: add a bias.
            same_input: `column_linears` passes this layer's input to another layer as well, which counts its saved bytes.
        """
        super().__init__()
        self.same_input = same_input
        rows = tp.share(out_features, f"{out_features} output features")
        self.tp = tp
        self.weight_grad_store: WeightGradStore | None = None
        part = Part((rows.start, 0), (len(rows), in_features))
        self.weight = tp.slice_parameter((out_features, in_features), part)
        self.bias = None
        if bias:
            part = Part((rows.start,), (len(rows),))
            self.bias = tp.slice_parameter((out_features,), part, init="zeros", decay=False)

    def flops(self, seq: int) -> Flops:
        """Return the FLOPs of one token's product with the whole weight."""
        return weight_flops(self.weight)

    def activation_bytes(self, shape: MicroBatchShape) -> ActivationBytes:
        """Return the bytes of the input, saved as it was before the gather, and of the factors of the weight's gradient."""
        rows, columns = self.weight.shape
        per_feature = shape.element * shape.tokens
        if self.same_input:
            return ActivationBytes(weight_grad=per_feature * rows)
        return ActivationBytes(saved=per_feature * columns // shape.shared, weight_grad=per_feature * (columns + rows))

    def forward(self, x: Tensor) -> Tensor:
        """Return this rank's output features, `[..., out_features / tp]`."""
        return column_linears(x, [self])[0]


def column_linears(x: Tensor, layers: Sequence[ColumnLinear]) -> tuple[Tensor, ...]:
    """Return the outputs of several ColumnLinears that share the input: one communication instead of one for each."""
    first = layers[0]
    weights, biases = [y.weight for y in layers], [y.bias for y in layers]
    return column_products(x, first.tp, weights, biases, first.weight_grad_store)


def column_products(
    x: Tensor,
    tp: TensorParallel,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    store: WeightGradStore | None = None,
) -> tuple[Tensor, ...]:
    """Return `x W^T + b` for several weights whose rows are divided over tp, as in `ColumnLinear` and the output layer.

    Args:
        x: `[seq, ..., in]`, under sequence parallelism this rank's slice `[seq / tp, ..., in]`.
        tp: the tensor-parallel ranks.
        weights: this rank's rows of each weight, `[out / tp, in]`.
        biases: for each weight `[out / tp]`, or None.
        store: store that can defer or fuse the weights' gradients; None leaves them to autograd.

    Returns:
        `[seq, ..., out / tp]` for each weight.
    """
    if tp.size == 1 or not torch.is_grad_enabled():
        whole = tp.join(x)  # [seq, ..., in]
        return tuple(linear(whole, w, b, store) for w, b in zip(weights, biases, strict=True))
    arguments = (x, tp, store, len(weights), *weights, *biases)
    outputs: tuple[Tensor, ...] = _ColumnLinears.apply(*arguments)  # type: ignore[no-untyped-call]
    return outputs


class RowLinear(nn.Module):
    """Linear layer `[..., in_features / tp] -> [..., out_features]`; this rank has in / tp columns from `rank * in / tp`.

    Every rank has the whole bias and adds it after the sum over the ranks. Under sequence parallelism the output is this rank's
    slice `[seq / tp, ...]`, so the bias gradients must be summed over the ranks. ValueError when the axis does not divide
    in_features.
    """

    def __init__(self, in_features: int, out_features: int, tp: TensorParallel, *, bias: bool, init: str = "normal") -> None:
        super().__init__()
        columns = tp.share(in_features, f"{in_features} input features")
        self.tp = tp
        self.weight_grad_store: WeightGradStore | None = None
        part = Part((0, columns.start), (out_features, len(columns)))
        self.weight = tp.slice_parameter((out_features, in_features), part, init=init)
        self.bias = tp.parameter(out_features, init="zeros", decay=False) if bias else None

    def flops(self, seq: int) -> Flops:
        """Return the FLOPs of one token's product with the whole weight."""
        return weight_flops(self.weight)

    def activation_bytes(self, shape: MicroBatchShape) -> ActivationBytes:
        """Return the bytes of the input, and of the factors of the weight's gradient: input and output gradient."""
        rows, columns = self.weight.shape
        per_feature = shape.element * shape.tokens
        return ActivationBytes(saved=per_feature * columns, weight_grad=per_feature * (columns + rows))

    def forward(self, x: Tensor) -> Tensor:
        """Return the output features `[..., out_features]`, summed over the ranks. x: `[..., in_features / tp]`."""
        if self.tp.size == 1:
            return linear(x, self.weight, self.bias, self.weight_grad_store)
        # The bias is added after the sum over ranks, which would otherwise count it once per rank.
        y = self.tp.leave(linear(x, self.weight, None, self.weight_grad_store))  # [seq or seq / tp, ..., out_features]
        return y if self.bias is None else y + self.bias
