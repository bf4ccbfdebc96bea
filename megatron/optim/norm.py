"""The norm of the whole model's gradients: every parameter counted once, whatever the layout."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron.mesh.mesh import Mesh
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


def counted(buffers: Sequence[FlatBuffer], flats: Sequence[Tensor], mesh: Mesh) -> list[Tensor]:
    """The parameters' views in the buffers' flat tensors that this rank counts, without padding.

    An empty one on a rank that counts nothing, such as one that holds the final norm and a copy of a tied matrix alone.
    """
    found = [
        spec_of(p).local(view)
        for buffer, flat in zip(buffers, flats, strict=True)
        for p, view in zip(buffer.parameters, buffer.views(flat), strict=True)
        if counted_here(spec_of(p), mesh)
    ]
    return found or [flats[0][:0]]


def global_norm(tensors: Sequence[Tensor], mesh: Mesh) -> Tensor:
    """L2 norm over all ranks that hold different parameters, fp32 scalar, equal on every rank.

    tensors: what this rank counts; already reduced over data-parallel ranks, which count the same. Their squares are added
    in fp64, so that the result does not depend on which rank adds which.
    """
    norms = torch.stack([torch.linalg.vector_norm(tensor) for tensor in tensors])
    return all_reduce(norms.double().square().sum(), mesh.tp_pp).sqrt().float()


def count_zeros(tensors: Sequence[Tensor], mesh: Mesh) -> int:
    """Number of exact zeros over all ranks' different parameters."""
    zeros = torch.stack([tensor.numel() - tensor.count_nonzero() for tensor in tensors]).sum()
    return int(all_reduce(zeros, mesh.tp_pp).item())
