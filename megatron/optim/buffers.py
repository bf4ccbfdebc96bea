"""Weights and gradients in contiguous memory, in buckets.

The parameters of a bucket lie behind one another in three flat tensors: the weights the model computes with, their
gradients, and the fp32 main weights (the weights themselves in an fp32 run). Parameters are views into the first two. So
the data-parallel reduction of a bucket is one collective, zeroing it is one kernel, and so is the optimizer's update.

Under the distributed optimizer (ZeRO-1, arXiv 1910.02054) each data-parallel rank owns one contiguous slice of every
bucket: it keeps the main weights and moments of the slice alone, and is given the sum of its gradients alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from megatron.mesh.mesh import Axis
from megatron.optim.sharding import owned, rectangles, stretches
from megatron.parallel.buckets import Bucket, buckets
from megatron.parallel.collectives import Pending, start_gather_slices
from megatron.parallel.spec import Part, Shard, spec_of


class FlatBuffer:
    """A bucket of parameters of one kind.

    axis: the ranks that own a slice each; alone, a rank owns it all. own: this rank's slice of the bucket.
    weights: compute dtype `[length]`. grads: `[length]`, in the dtype that gradients are accumulated and reduced in: fp32, or
    that of the weights. own_grads: a view of grads, the slice. main: fp32, of the slice; in an fp32 run a view of weights.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], bucket: Bucket, axis: Axis, grad_dtype: torch.dtype = torch.float32
    ) -> None:
        self.parameters, self.bucket, self.axis = list(parameters), bucket, axis
        self.own = owned(bucket.length, axis.size, axis.rank)
        example = self.parameters[0]
        self.weights = torch.zeros(bucket.length, dtype=example.dtype, device=example.device)
        self.grads = torch.zeros(bucket.length, dtype=grad_dtype, device=example.device)
        for p, weight, grad in zip(self.parameters, self.views(self.weights), self.views(self.grads), strict=True):
            weight.copy_(p.detach())
            p.data = weight
            p.main_grad = grad  # type: ignore[attr-defined]  # for who adds to it without autograd
            if p.dtype == grad_dtype:
                p.grad = grad  # autograd adds to it in place
            else:
                p.register_post_accumulate_grad_hook(_adder(grad))  # type: ignore[no-untyped-call]
        self.main = self.weights[self.own] if example.dtype == torch.float32 else self.weights[self.own].float()
        self.own_grads = self.grads[self.own]

    def views(self, flat: Tensor) -> Iterator[Tensor]:
        """The parameters' places in a flat tensor of the whole bucket, in their shapes."""
        for p, offset in zip(self.parameters, self.bucket.offsets, strict=True):
            yield flat[offset : offset + p.numel()].view(p.shape)

    def stretches(self, own: Tensor) -> Iterator[tuple[nn.Parameter, int, Tensor]]:
        """What a tensor of this rank's slice holds: parameter, first element of it, the values; padding left out."""
        # Only dimension 0 is ever padded, so what is no padding comes first in the flattened parameter.
        sizes = [prod(spec_of(p).part.shape) for p in self.parameters]
        for stretch in stretches(self.bucket.offsets, sizes, self.own):
            values = own[stretch.place : stretch.place + stretch.high - stretch.low]
            yield self.parameters[stretch.member], stretch.low, values

    def shards(self, own: Tensor, prefix: str = "") -> Iterator[Shard]:
        """A tensor of this rank's slice as a checkpoint sees it: rectangles of the parameters, views of the slice."""
        for p, low, values in self.stretches(own):
            spec = spec_of(p)
            for piece in rectangles(spec.part.shape, low, low + values.numel()):
                start = tuple(a + b for a, b in zip(spec.part.start, piece.start, strict=True))
                data = values[piece.first - low : piece.first - low + piece.size].view(piece.shape)
                yield Shard(prefix + spec.name, spec.shape, Part(start, piece.shape), spec.split_over, data)

    def draft(self) -> Tensor:
        """A flat fp32 tensor for new weights of the whole bucket; `adopt` takes it."""
        return torch.zeros_like(self.weights, dtype=torch.float32)

    def adopt(self, whole: Tensor) -> None:
        """Take fp32 weights of the whole bucket, equal on all ranks. No communication."""
        self.weights.copy_(whole)
        self.main.copy_(whole[self.own])

    def start_publish(self) -> Pending:
        """Give the model the main weights, rounded to its dtype: this rank's slice at once, the others' as they come."""
        if self.weights.dtype != torch.float32:
            self.weights[self.own].copy_(self.main)
        return start_gather_slices(self.weights, self.axis)

    def publish(self) -> None:
        """The same, complete. Collective over `axis`."""
        self.start_publish().wait()


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
        """Called when the main weights were filled. Collective where ranks own slices."""
        for buffer in self._buffers:
            buffer.publish()


def flat_buffers(
    parameters: Sequence[nn.Parameter] | Iterator[nn.Parameter],
    limit: int | None = None,
    axis: Axis | None = None,
    grad_dtype: torch.dtype = torch.float32,
) -> list[FlatBuffer]:
    """Buckets for all parameters, in the order in which the backward pass completes them.

    parameters: in the order of the forward pass. limit: elements of a bucket; None: one bucket a kind. axis: the ranks that
    own a slice of each bucket; None: this one owns all. grad_dtype: of the gradients, fp32 or the parameters' own.
    The copies of a tied matrix have a bucket of their own: it is the same on both stages, and so are the slices.
    """
    held, axis = list(parameters), axis or Axis.alone("dp_cp")
    specs = [spec_of(p) for p in held]
    kinds = [(spec.decay, spec.lr_scale, spec.decoupled, "embedding" in spec.sum_grad_over) for spec in specs]
    found = buckets([p.numel() for p in held], kinds, limit, axis.size)
    return [FlatBuffer([held[i] for i in bucket.members], bucket, axis, grad_dtype) for bucket in found]
