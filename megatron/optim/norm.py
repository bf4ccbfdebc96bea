"""The norm of the whole model's gradients: every parameter is counted once, under any parallel layout.

A NaN or Inf anywhere, even in a copy that is not counted, makes the norm non-finite on all ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.mesh.grid import complementary_axes
from megatron.mesh.mesh import Axis, Mesh
from megatron.optim.buffers import FlatBuffer
from megatron.parallel.collectives import all_reduce
from megatron.parallel.spec import ParameterSpec, param_spec


def owns_in_norm(spec: ParameterSpec, mesh: Mesh) -> bool:
    """Return whether this rank counts a parameter: whether it is the first of the ranks with copies of it.

    Copies on the data axis are not considered. The parameter is copied over each of the stage's other axes that does not split
    it, and over the axes that its gradients are summed over, which may connect different stages.
    """
    copied = (complementary_axes(spec.data_axis) - spec.split_over) | spec.sum_grad_over
    return all(mesh.axis(name).first for name in copied)


@dataclass(frozen=True)
class LocalTensors:
    """Views of the parameters in this rank's slices of the buckets, without padding, each `[elements]`.

    counted: those that this rank counts. copies: those that another rank counts.
    """

    counted: list[Tensor]
    copies: list[Tensor]

    @classmethod
    def from_slices(cls, buffers: Sequence[FlatBuffer], slices: Sequence[Tensor], mesh: Mesh) -> LocalTensors:
        """Divide the parameters in `slices` into counted ones and copies.

        Args:
            buffers: the buckets.
            slices: a tensor `[own]` for each bucket, of this rank's slice.
            mesh: mesh with the axes that the parameters' specs name.

        Returns:
            The views. `counted` is never empty: on a rank that counts nothing it is one tensor without elements.
        """
        counted: list[Tensor] = []
        copies: list[Tensor] = []
        for buffer, own in zip(buffers, slices, strict=True):
            # If the data-parallel ranks own slices, each counts its own; if they all have the whole bucket, the first does.
            counts_bucket = buffer.owners.size > 1 or buffer.data_axis.first
            for p, _, values in buffer.param_ranges(own):
                if counts_bucket and owns_in_norm(param_spec(p), mesh):
                    counted.append(values)
                else:
                    copies.append(values)
        return cls(counted or [slices[0][:0]], copies)


def global_norm(tensors: LocalTensors, world: Axis) -> Tensor:
    """Return the L2 norm over all ranks, fp32 scalar, equal on every rank; non-finite if a copy is non-finite. Collective.

    Squares are summed in fp64, so that the parallel layout hardly affects the result.

    Args:
        tensors: this rank's tensors; gradients must have been reduced.
        world: all ranks of the run.
    """
    # One all-reduce for both sums: [2], fp64.
    zero = tensors.counted[0].new_zeros((), dtype=torch.float64)
    local_copies = _sum_of_squares(tensors.copies) if tensors.copies else zero
    counted, copies = all_reduce(torch.stack([_sum_of_squares(tensors.counted), local_copies]), world)
    return torch.where(copies.isfinite(), counted, copies).sqrt().float()


def count_zeros(tensors: LocalTensors, world: Axis) -> int:
    """Return the number of elements that are exactly zero, over all ranks, each element counted once. Collective."""
    zeros = torch.stack([tensor.numel() - tensor.count_nonzero() for tensor in tensors.counted]).sum()
    return int(all_reduce(zeros, world).item())


def _sum_of_squares(tensors: list[Tensor]) -> Tensor:
    """Return the sum of the squares of all elements, fp64 scalar."""
    # The norms are computed in fp32: those of 16-bit tensors would be rounded to three digits.
    return torch.stack(torch._foreach_norm(tensors, 2, torch.float32)).double().square().sum()
