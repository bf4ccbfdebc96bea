"""The norm of the whole model's gradients: every parameter counted once, whatever the layout.

A NaN or Inf counts wherever it is, also in a copy that the norm leaves out: then the norm is not finite, on any rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Held:
    """What a rank holds of its slices of the buckets, without padding; views, each `[elements]`.

    counted: what this rank counts. copies: what another one counts.
    """

    counted: list[Tensor]
    copies: list[Tensor]

    @classmethod
    def of(cls, buffers: Sequence[FlatBuffer], slices: Sequence[Tensor], mesh: Mesh) -> Held:
        """slices: one tensor of this rank's slice of each bucket.

        counted has an empty tensor on a rank that counts nothing, such as one with a copy of a tied matrix alone.
        """
        found: dict[bool, list[Tensor]] = {True: [], False: []}
        for buffer, own in zip(buffers, slices, strict=True):
            for p, _, values in buffer.stretches(own):
                found[counted_here(spec_of(p), mesh)].append(values)
        return cls(found[True] or [slices[0][:0]], found[False])


def global_norm(held: Held, axes: Sequence[Axis]) -> Tensor:
    """L2 norm over all ranks that hold different elements, fp32 scalar, equal on every rank; not finite where a copy is not.

    held: already summed over data-parallel ranks. axes: those whose ranks count different elements. Squares are added in
    fp64, so that the result does not depend on which rank adds which.
    """
    none = held.counted[0].new_zeros((), dtype=torch.float64)
    squares, of_copies = _total(torch.stack([_squares(held.counted), _squares(held.copies) if held.copies else none]), axes)
    return torch.where(of_copies.isfinite(), squares, of_copies).sqrt().float()


def count_zeros(held: Held, axes: Sequence[Axis]) -> int:
    """Number of exact zeros over all ranks' different elements."""
    zeros = torch.stack([tensor.numel() - tensor.count_nonzero() for tensor in held.counted]).sum()
    return int(_total(zeros, axes).item())


def _squares(tensors: list[Tensor]) -> Tensor:
    """The sum of all squares, fp64 scalar."""
    # A 16-bit norm would be rounded to three digits.
    return torch.stack(torch._foreach_norm(tensors, 2, torch.float32)).double().square().sum()


def _total(value: Tensor, axes: Sequence[Axis]) -> Tensor:
    for axis in axes:
        value = all_reduce(value, axis)
    return value
