"""Tensor parallelism as one value: over which ranks layers are cut, and in what form activations pass between the cut layers.

A column-parallel layer followed by a row-parallel one is a region, entered once and left once (arXiv 1909.08053). Between the
regions every rank holds whole activations, or with sequence parallelism its slice of the sequence, dimension 0 (2205.05198):

    sequence parallel    between regions    enter                          leave
    no                   whole              identity, backward all-reduce  all-reduce, backward identity
    yes                  slice of dim 0     all-gather, backward           reduce-scatter, backward
                                            reduce-scatter                 all-gather

A layer says `tp.enter(x)` and need not know which of the two it is. On an axis of size 1 nothing is cut and nothing happens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from megatron.mesh.mesh import Axis
from megatron.parallel.collectives import (
    CollectiveWork,
    all_gather_async,
    all_reduce_async,
    copy_to,
    gather_and_reduce_grad,
    gather_from,
    reduce_from,
    reduce_scatter_async,
    reduce_scatter_to,
)
from megatron.parallel.spec import ParameterSpec, Part, describe


@dataclass(frozen=True)
class TensorParallel:
    """The ranks that the layers of a model are cut over.

    Attributes:
        axis: the tensor-parallel ranks.
        sequence_parallel: cut activations between the regions too; False on an axis of size 1.
    """

    axis: Axis
    sequence_parallel: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "sequence_parallel", self.sequence_parallel and self.axis.size > 1)

    @classmethod
    def alone(cls) -> TensorParallel:
        """Return the value of a single process: nothing is cut."""
        return cls(Axis.alone("tp"))

    @property
    def size(self) -> int:
        """Number of tensor-parallel ranks."""
        return self.axis.size

    @property
    def on_whole_sequences(self) -> TensorParallel:
        """The same without sequence parallelism: for a layer outside of the regions that is given whole sequences."""
        return replace(self, sequence_parallel=False)

    def share(self, count: int, of_what: str) -> range:
        """Return which of `count` equal things, such as features or heads, this rank holds.

        Raises:
            ValueError: they do not divide over the ranks; the message calls them `of_what`.
        """
        if count % self.size:
            raise ValueError(f"{of_what} do not divide over {self.size} tensor-parallel ranks")
        each = count // self.size
        return range(self.axis.rank * each, (self.axis.rank + 1) * each)

    def positions(self, seq: int) -> slice:
        """Return which of `seq` positions this rank holds between the regions."""
        if not self.sequence_parallel:
            return slice(0, seq)
        each = seq // self.size
        return slice(self.axis.rank * each, (self.axis.rank + 1) * each)

    def enter(self, x: Tensor) -> Tensor:
        """Enter a region: `[seq, ...]` or this rank's slice of it -> `[seq, ...]`, used by each rank for its part of a sum."""
        return gather_and_reduce_grad(x, self.axis) if self.sequence_parallel else copy_to(x, self.axis)

    def leave(self, x: Tensor) -> Tensor:
        """Leave a region: add the ranks' parts `[seq, ...]` up -> the sum `[seq, ...]`, or this rank's slice of it."""
        return reduce_scatter_to(x, self.axis) if self.sequence_parallel else reduce_from(x, self.axis)

    def join(self, x: Tensor) -> Tensor:
        """Join what ranks hold between the regions -> `[seq, ...]`, which all ranks then use in the same way."""
        return gather_from(x, self.axis, 0) if self.sequence_parallel else x

    def enter_async(self, x: Tensor) -> CollectiveWork:
        """Start what `enter` does forward, for a layer that writes its own backward pass; `leave`'s backward is the same."""
        return all_gather_async(x, self.axis) if self.sequence_parallel else CollectiveWork(None, lambda: x)

    def leave_async(self, x: Tensor) -> CollectiveWork:
        """Start what `leave` does forward, maybe in place; `enter`'s backward is the same."""
        return reduce_scatter_async(x, self.axis) if self.sequence_parallel else all_reduce_async(x, self.axis)

    def parameter(self, *shape: int, init: str, decay: bool = True) -> nn.Parameter:
        """Return a parameter that every rank holds whole, for work between the regions.

        Where a rank sees only its slice of the sequence there, gradients are summed over the ranks.

        Args:
            shape: of the parameter.
            init: the rule of `model/init.py` that draws it.
            decay: whether weight decay applies.
        """
        axes = frozenset({self.axis.name}) if self.sequence_parallel else frozenset[str]()
        spec = ParameterSpec("", shape, Part.whole(shape), sum_grad_over=axes, decay=decay, init=init)
        return describe(nn.Parameter(torch.empty(shape)), spec)

    def slice_parameter(self, shape: tuple[int, ...], part: Part, *, init: str = "normal", decay: bool = True) -> nn.Parameter:
        """Return this rank's `part` of a parameter of `shape` that is cut over the ranks.

        Args:
            shape: of the whole parameter.
            part: the rectangle that this rank holds.
            init: the rule of `model/init.py` that draws it.
            decay: whether weight decay applies.
        """
        spec = ParameterSpec("", shape, part, frozenset({self.axis.name}), decay=decay, init=init)
        return describe(nn.Parameter(torch.empty(part.shape)), spec)
