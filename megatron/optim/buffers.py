"""Weights and gradients in contiguous memory, in buckets.

The parameters of a bucket are stored one after another in three flat tensors: the model's weights, their gradients, and the
fp32 main weights (the weights themselves in an fp32 run). Parameters are views of the first, their gradients of the second.
The data-parallel reduction of a bucket is therefore one collective; zeroing and updating it are one kernel each.

Under the distributed optimizer (ZeRO-1, arXiv 1910.02054) each data-parallel rank owns one contiguous slice of every
bucket: it stores main weights and moments only for that slice, and receives summed gradients only for that slice.
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

    data_axis: the ranks that sum its gradients. owners: the ranks that own a slice each; an axis of one rank if every rank owns
    the whole bucket. own: this rank's slice of the bucket.
    weights: compute dtype, `[length]`. grads: gradient dtype (fp32 or that of the weights), `[length]`. own_grads: the view of
    grads for the slice, `[own]`. main: fp32 main weights of the slice, `[own]`; a view of weights in an fp32 run.
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
            p.data = weight  # frees the module's own tensor: from here on the parameter is a view of the buffer
            p.main_grad = grad  # type: ignore[attr-defined]  # for code that adds gradients without autograd
            if p.dtype == grad_dtype:
                p.grad = grad  # autograd adds to it in place
            else:
                p.register_post_accumulate_grad_hook(_make_grad_hook(grad))  # type: ignore[no-untyped-call]
        own_weights = self.weights[self.own]  # [own]
        self.main = own_weights if example.dtype == torch.float32 else own_weights.float()  # [own]
        self.own_grads = self.grads[self.own]  # [own]

    def views(self, flat: Tensor) -> Iterator[Tensor]:
        """Yield the view of each parameter, in its shape, in a flat tensor `[length]` of the whole bucket."""
        for p, offset in zip(self.parameters, self.bucket.offsets, strict=True):
            yield flat[offset : offset + p.numel()].view(p.shape)

    def param_ranges(self, own: Tensor) -> Iterator[tuple[nn.Parameter, int, Tensor]]:
        """Yield the parameters in a tensor of this rank's slice `[own]`: parameter, its first element in the slice, its values.

        Padding is excluded.
        """
        # Only dimension 0 is ever padded, so the padding is at the end of the flattened parameter.
        sizes = [prod(param_spec(p).part.shape) for p in self.parameters]
        for r in param_ranges(self.bucket.offsets, sizes, self.own):
            values = own[r.slice_offset : r.slice_offset + r.high - r.low]  # [high - low]
            yield self.parameters[r.member], r.low, values

    def whole_params(self, own: Tensor) -> Iterator[tuple[ParameterSpec, Tensor]]:
        """Yield the parameters in a tensor of this rank's slice `[own]`, each with its values in the shape of its part.

        ValueError if the slice cuts a parameter. `flat_buffers` prevents it for update rules that need whole parameters.
        """
        for p, _, values in self.param_ranges(own):
            spec = param_spec(p)
            if values.numel() != prod(spec.part.shape):
                raise ValueError(f"this rank's slice cuts {spec.name}, which its optimizer needs whole")
            yield spec, values.view(spec.part.shape)

    def shards(self, own: Tensor, prefix: str = "") -> Iterator[Shard]:
        """Yield a tensor of this rank's slice `[own]` as checkpoint shards: rectangles of the parameters, as views."""
        for p, low, values in self.param_ranges(own):
            spec = param_spec(p)
            for piece in rectangles(spec.part.shape, low, low + values.numel()):
                start = tuple(a + b for a, b in zip(spec.part.start, piece.start, strict=True))
                # A view, so that loading a checkpoint fills the buffer in place.
                data = values[piece.first - low : piece.first - low + piece.size].view(piece.shape)
                yield Shard(prefix + spec.name, spec.shape, Part(start, piece.shape), spec.split_over, data)

    def staging_tensor(self) -> Tensor:
        """Return a zeroed fp32 tensor `[length]` to be filled with weights of the whole bucket and passed to `load`."""
        return torch.zeros_like(self.weights, dtype=torch.float32)

    def load(self, weights: Tensor) -> None:
        """Copy fp32 weights `[length]` of the whole bucket, equal on all ranks, into the buffer. No communication."""
        self.weights.copy_(weights)  # [length], rounded to the model's dtype
        self.main.copy_(weights[self.own])

    def all_gather_params_async(self) -> CollectiveWork:
        """Copy the main weights into the model's weights, rounded to its dtype; start to gather the slices of other ranks."""
        if self.weights.dtype != torch.float32:
            self.weights[self.own].copy_(self.main)  # [own]; in an fp32 run `main` is a view of `weights`
        return gather_slices_async(self.weights, self.owners)

    def all_gather_params(self) -> None:
        """Copy the main weights of all ranks into the model's weights. Collective over `owners`."""
        self.all_gather_params_async().wait()


def _make_grad_hook(total: Tensor) -> Any:
    def add(parameter: Tensor) -> None:
        if parameter.grad is not None:
            total.add_(parameter.grad)
            parameter.grad = None

    return add


class MainWeights:
    """Checkpoint part with the model's weights: the fp32 main weights under global names."""

    def __init__(self, buffers: Sequence[FlatBuffer]) -> None:
        self._buffers = buffers

    def shards(self) -> Iterator[Shard]:
        for buffer in self._buffers:
            yield from buffer.shards(buffer.main)

    def scalars(self) -> dict[str, Any]:
        return {}

    def load_scalars(self, values: Mapping[str, Any]) -> None:
        """Update the model's weights: there are no scalars, but the loader has just filled the main weights. Collective."""
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
    """Move all parameters into flat buffers, in the order in which the backward pass completes their gradients.

    Args:
        parameters: parameters in the order of the forward pass.
        limit: maximum number of elements of a bucket; None: one bucket for each kind of parameter.
        mesh: mesh with the axes that the parameters' specs name; None: this rank is alone on all of them.
        sharded: each rank of a bucket's data axis owns a slice of it, else the whole bucket.
        grad_dtype: dtype of the gradients, fp32 or that of the parameters.
        optimizer: name of the optimizer that will update them.

    Returns:
        The buffers. All parameters of one have the same dtype, data axis, learning rate, weight decay and update rule.
    """
    params, find_axis = list(parameters), Axis.alone if mesh is None else mesh.axis
    rules = [rule_for(optimizer, param_spec(p).name, param_spec(p).shape) for p in params]
    kinds = [(p.dtype, rule, param_spec(p).bucket_kind) for p, rule in zip(params, rules, strict=True)]
    axes = {kind: find_axis(param_spec(p).data_axis) for p, kind in zip(params, kinds, strict=True)}
    shards = {kind: axis.size if sharded else 1 for kind, axis in axes.items()}
    whole = {kind for kind, rule in zip(kinds, rules, strict=True) if rule.whole}
    return [
        FlatBuffer(
            [params[i] for i in bucket.members], bucket, axes[kinds[bucket.members[0]]], sharded=sharded, grad_dtype=grad_dtype
        )
        for bucket in buckets([p.numel() for p in params], kinds, limit, shards, whole)
    ]
