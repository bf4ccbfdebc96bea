"""Weights and gradients in contiguous memory, in buckets.

The parameters of a bucket lie behind one another in three flat tensors: the weights the model computes with, their
gradients, and the fp32 main weights (the weights themselves in an fp32 run). Parameters are views into the first two. So
the data-parallel reduction of a bucket is one collective, zeroing it is one kernel, and so is the optimizer's update.

Under the distributed optimizer (ZeRO-1, arXiv 1910.02054) each data-parallel rank owns one contiguous slice of every
bucket: it keeps the main weights and moments of the slice alone, and is given the sum of its gradients alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from megatron.config.optimizers import rule_for
from megatron.mesh.mesh import Axis, Mesh
from megatron.optim.sharding import owned_slice, param_ranges, rectangles
from megatron.parallel.buckets import Bucket, buckets
from megatron.parallel.collectives import CollectiveWork, gather_slices_async
from megatron.parallel.spec import ParameterSpec, Part, Shard, param_spec


class FlatBuffer:
    """A bucket of parameters of one kind.

    data_axis: the ranks that sum its gradients. owners: those that own a slice each; alone, a rank owns it all. own: this
    rank's slice of the bucket.
    weights: compute dtype `[length]`. grads: `[length]`, in the dtype that gradients are accumulated and reduced in: fp32, or
    that of the weights. own_grads: a view of grads, the slice. main: fp32, of the slice; in an fp32 run a view of weights.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        bucket: Bucket,
        data_axis: Axis,
        *,
        sharded: bool = False,
        grad_dtype: torch.dtype = torch.float32,
    ) -> None:
        self.parameters, self.bucket, self.data_axis = list(parameters), bucket, data_axis
        self.owners = data_axis if sharded else Axis.alone(data_axis.name)
        self.own = owned_slice(bucket.length, self.owners.size, self.owners.rank)
        example = self.parameters[0]
        self.weights = torch.zeros(bucket.length, dtype=example.dtype, device=example.device)  # [length]
        self.grads = torch.zeros(bucket.length, dtype=grad_dtype, device=example.device)  # [length]
        for p, weight, grad in zip(self.parameters, self.views(self.weights), self.views(self.grads), strict=True):
            weight.copy_(p.detach())
            p.data = weight  # the module's own tensor is let go: from here on the buffer is the weight
            p.main_grad = grad  # type: ignore[attr-defined]  # for who adds to it without autograd
            if p.dtype == grad_dtype:
                p.grad = grad  # autograd adds to it in place
            else:
                p.register_post_accumulate_grad_hook(_make_grad_hook(grad))  # type: ignore[no-untyped-call]
        own_weights = self.weights[self.own]  # [own]
        self.main = own_weights if example.dtype == torch.float32 else own_weights.float()  # [own]
        self.own_grads = self.grads[self.own]  # [own]

    def views(self, flat: Tensor) -> Iterator[Tensor]:
        """Yield the parameters' places in a flat tensor `[length]` of the whole bucket, in their shapes."""
        for p, offset in zip(self.parameters, self.bucket.offsets, strict=True):
            yield flat[offset : offset + p.numel()].view(p.shape)

    def param_ranges(self, own: Tensor) -> Iterator[tuple[nn.Parameter, int, Tensor]]:
        """Yield what a tensor of this rank's slice `[own]` holds: parameter, its first element there, the values.

        Padding is left out.
        """
        # Only dimension 0 is ever padded, so what is no padding comes first in the flattened parameter.
        sizes = [prod(param_spec(p).part.shape) for p in self.parameters]
        for each in param_ranges(self.bucket.offsets, sizes, self.own):
            values = own[each.place : each.place + each.high - each.low]  # [high - low]
            yield self.parameters[each.member], each.low, values

    def whole_params(self, own: Tensor) -> Iterator[tuple[ParameterSpec, Tensor]]:
        """Yield the parameters in a tensor of this rank's slice `[own]`, each with its values in the shape of its part.

        ValueError where the slice cuts one: those of a rule that needs them whole are laid out so that none is.
        """
        for p, _, values in self.param_ranges(own):
            spec = param_spec(p)
            if values.numel() != prod(spec.part.shape):
                raise ValueError(f"this rank's slice cuts {spec.name}, which its optimizer needs whole")
            yield spec, values.view(spec.part.shape)

    def shards(self, own: Tensor, prefix: str = "") -> Iterator[Shard]:
        """Yield a tensor of this rank's slice `[own]` as a checkpoint sees it: rectangles of the parameters, as views."""
        for p, low, values in self.param_ranges(own):
            spec = param_spec(p)
            for piece in rectangles(spec.part.shape, low, low + values.numel()):
                start = tuple(a + b for a, b in zip(spec.part.start, piece.start, strict=True))
                # A view, so that loading a checkpoint fills the buffer in place.
                data = values[piece.first - low : piece.first - low + piece.size].view(piece.shape)
                yield Shard(prefix + spec.name, spec.shape, Part(start, piece.shape), spec.split_over, data)

    def staging_tensor(self) -> Tensor:
        """Return a flat fp32 tensor `[length]` for new weights of the whole bucket; `load` takes it."""
        return torch.zeros_like(self.weights, dtype=torch.float32)

    def load(self, whole: Tensor) -> None:
        """Take fp32 weights `[length]` of the whole bucket, equal on all ranks. No communication."""
        self.weights.copy_(whole)  # [length], rounded to the model's dtype
        self.main.copy_(whole[self.own])

    def all_gather_params_async(self) -> CollectiveWork:
        """Give the model the main weights, rounded to its dtype: this rank's slice at once, the others' as they come."""
        if self.weights.dtype != torch.float32:
            self.weights[self.own].copy_(self.main)  # [own]; in an fp32 run `main` is this very memory
        return gather_slices_async(self.weights, self.owners)

    def all_gather_params(self) -> None:
        """Give the model the main weights, all of them. Collective over `owners`."""
        self.all_gather_params_async().wait()


def _make_grad_hook(total: Tensor) -> Any:
    def add(parameter: Tensor) -> None:
        if parameter.grad is not None:
            total.add_(parameter.grad)
            parameter.grad = None

    return add


class MainWeights:
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
            buffer.all_gather_params()


def flat_buffers(
    parameters: Iterable[nn.Parameter],
    limit: int | None = None,
    mesh: Mesh | None = None,
    *,
    sharded: bool = False,
    grad_dtype: torch.dtype = torch.float32,
    optimizer: str = "adam",
) -> list[FlatBuffer]:
    """Lay all parameters into buckets, in the order in which the backward pass completes them.

    Args:
        parameters: in the order of the forward pass.
        limit: elements of a bucket; None: one bucket a kind.
        mesh: knows the axes that the parameters' specs name; None: this rank is alone on all of them.
        sharded: whether each rank of a bucket's data axis owns a slice of it.
        grad_dtype: of the gradients, fp32 or the parameters' own.
        optimizer: which will update them.

    Returns:
        The buckets. Parameters of one bucket have one dtype, one data axis, one rate, one weight decay and one rule of update.
    """
    held, find = list(parameters), Axis.alone if mesh is None else mesh.axis
    rules = [rule_for(optimizer, param_spec(p).name, param_spec(p).shape) for p in held]
    kinds = [(p.dtype, rule, param_spec(p).bucket_kind) for p, rule in zip(held, rules, strict=True)]
    axes = {kind: find(param_spec(p).data_axis) for p, kind in zip(held, kinds, strict=True)}
    shards = {kind: axis.size if sharded else 1 for kind, axis in axes.items()}
    whole = {kind for kind, rule in zip(kinds, rules, strict=True) if rule.whole}
    found = buckets([p.numel() for p in held], kinds, limit, shards, whole)
    return [
        FlatBuffer(
            [held[i] for i in bucket.members], bucket, axes[kinds[bucket.members[0]]], sharded=sharded, grad_dtype=grad_dtype
        )
        for bucket in found
    ]
