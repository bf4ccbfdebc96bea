"""The norm of the whole model's gradients: every parameter counted once, whatever the layout.

A NaN or Inf counts wherever it is, also in a copy that the norm leaves out: then the norm is not finite, on any rank.
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
    """Return whether this rank is the first of those that hold copies of a parameter, data-parallel ones aside.

    The ranks of a stage are those of the data axis times those of some further axes; over each of the further ones a
    parameter is split, or copied. Axes that its gradients are summed over have copies too, also on other stages.
    """
    copied = (complementary_axes(spec.data_axis) - spec.split_over) | spec.sum_grad_over
    return all(mesh.axis(name).first for name in copied)


@dataclass(frozen=True)
class LocalTensors:
    """This rank's slices of the buckets, without padding; views, each `[elements]`.

    counted: what this rank counts. copies: what another one counts.
    """

    counted: list[Tensor]
    copies: list[Tensor]

    @classmethod
    def from_slices(cls, buffers: Sequence[FlatBuffer], slices: Sequence[Tensor], mesh: Mesh) -> LocalTensors:
        """Sort the parameters in `slices` by whether this rank counts them.

        Args:
            buffers: the buckets.
            slices: one tensor `[own]` of this rank's slice of each bucket.
            mesh: knows the axes that the parameters' specs name.

        Returns:
            The views. `counted` has an empty tensor on a rank that counts nothing.
        """
        counted: list[Tensor] = []
        copies: list[Tensor] = []
        for buffer, own in zip(buffers, slices, strict=True):
            # Where ranks own slices, each counts its own; where all have the whole bucket, the first one does.
            first = buffer.owners.size > 1 or buffer.data_axis.first
            for p, _, values in buffer.param_ranges(own):
                if first and owns_in_norm(param_spec(p), mesh):
                    counted.append(values)
                else:
                    copies.append(values)
        return cls(counted or [slices[0][:0]], copies)


def global_norm(tensors: LocalTensors, everyone: Axis) -> Tensor:
    """Return the L2 norm over all ranks, fp32 scalar, equal on every rank; not finite where a copy is not.

    Squares are added in fp64, so that the result does not depend on which rank adds which.

    Args:
        tensors: already summed over the ranks that sum them.
        everyone: all ranks of the run.
    """
    # One all-reduce for both sums: [2], fp64.
    none = tensors.counted[0].new_zeros((), dtype=torch.float64)
    copies = _squares(tensors.copies) if tensors.copies else none
    squares, of_copies = all_reduce(torch.stack([_squares(tensors.counted), copies]), everyone)
    return torch.where(of_copies.isfinite(), squares, of_copies).sqrt().float()


def count_zeros(tensors: LocalTensors, everyone: Axis) -> int:
    """Return the number of exact zeros over all ranks' different elements."""
    zeros = torch.stack([tensor.numel() - tensor.count_nonzero() for tensor in tensors.counted]).sum()
    return int(all_reduce(zeros, everyone).item())


def _squares(tensors: list[Tensor]) -> Tensor:
    """The sum of all squares, fp64 scalar."""
    # A 16-bit norm would be rounded to three digits.
    return torch.stack(torch._foreach_norm(tensors, 2, torch.float32)).double().square().sum()
