"""The norm of the whole model's gradients: every parameter counted once, whatever the layout."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron.mesh.mesh import Axis, Mesh
from megatron.optim.buffers import FlatBuffer
from megatron.parallel.collectives import all_reduce
from megatron.parallel.spec import ParamSpec, spec_of


def counted_here(spec: ParamSpec, mesh: Mesh) -> bool:
    """Whether this rank is the one that counts its copy of a parameter.

    A parameter split over tp is counted on every tp rank, a part each; another one on the first tp rank alone. Of a tied
    matrix that the first and the last stage hold, the first stage's copy counts.
    """
    first_copy = "embedding" not in spec.sum_grad_over or mesh.embedding.first
    return first_copy and ("tp" in spec.split_over or mesh.tp.first)


def counted(buffers: Sequence[FlatBuffer], slices: Sequence[Tensor], mesh: Mesh) -> list[Tensor]:
    """What this rank counts of tensors of its slices of the buckets, without padding; each `[elements]`.

    An empty one on a rank that counts nothing, such as one that holds the final norm and a copy of a tied matrix alone.
    """
    found = [
        values
        for buffer, own in zip(buffers, slices, strict=True)
        for p, _, values in buffer.stretches(own)
        if counted_here(spec_of(p), mesh)
    ]
    return found or [slices[0][:0]]


def global_norm(tensors: Sequence[Tensor], axes: Sequence[Axis]) -> Tensor:
    """L2 norm over all ranks that hold different elements, fp32 scalar, equal on every rank.

    tensors: what this rank counts, already summed over data-parallel ranks. axes: those whose ranks count different
    elements. Squares are added in fp64, so that the result does not depend on which rank adds which.
    """
    norms = torch.stack([torch.linalg.vector_norm(tensor) for tensor in tensors])
    return _total(norms.double().square().sum(), axes).sqrt().float()


def count_zeros(tensors: Sequence[Tensor], axes: Sequence[Axis]) -> int:
    """Number of exact zeros over all ranks' different elements."""
    zeros = torch.stack([tensor.numel() - tensor.count_nonzero() for tensor in tensors]).sum()
    return int(_total(zeros, axes).item())


def _total(value: Tensor, axes: Sequence[Axis]) -> Tensor:
    for axis in axes:
        value = all_reduce(value, axis)
    return value
