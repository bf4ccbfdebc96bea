"""Tensor parallelism as a value: the ranks that layers are divided over, and the collectives between the divided layers.

A column-parallel layer followed by a row-parallel one is a region, entered once and left once (arXiv 1909.08053). Between the
regions every rank has whole activations, or with sequence parallelism its slice of the sequence, dimension 0 (2205.05198):

    sequence parallel    between regions    enter                          leave
    no                   whole              identity, backward all-reduce  all-reduce, backward identity
    yes                  slice of dim 0     all-gather, backward           reduce-scatter, backward
                                            reduce-scatter                 all-gather

A layer calls `tp.enter(x)` in both cases. On an axis of size 1 nothing is divided, and these calls return their argument.
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
    """The ranks over which the layers of a model are divided.

    Attributes:
        axis: the tensor-parallel ranks.
        sequence_parallel: activations between the regions are divided too; always False on an axis of size 1.
    """

    axis: Axis
    sequence_parallel: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "sequence_parallel", self.sequence_parallel and self.axis.size > 1)

    @classmethod
    def alone(cls) -> TensorParallel:
        """Return the value for a single process, on which nothing is divided."""
        return cls(Axis.alone("tp"))

    @property
    def size(self) -> int:
        """Number of tensor-parallel ranks."""
        return self.axis.size

    @property
    def on_whole_sequences(self) -> TensorParallel:
        """The same ranks without sequence parallelism, for a layer between the regions whose input is whole sequences."""
        return replace(self, sequence_parallel=False)

    def share(self, count: int, of_what: str) -> range:
        """Return this rank's indices of `count` equal items, such as features or heads.

        Raises:
            ValueError: the number of ranks does not divide `count`; the message calls the items `of_what`.
        """
        if count % self.size:
            raise ValueError(f"{of_what} do not divide over {self.size} tensor-parallel ranks")
        per_rank = count // self.size
        return range(self.axis.rank * per_rank, (self.axis.rank + 1) * per_rank)

    def positions(self, seq: int) -> slice:
        """Return this rank's positions, between the regions, of a sequence of `seq` tokens."""
        if not self.sequence_parallel:
            return slice(0, seq)
        per_rank = seq // self.size
        return slice(self.axis.rank * per_rank, (self.axis.rank + 1) * per_rank)

    def enter(self, x: Tensor) -> Tensor:
        """Enter a region: `[seq, ...]` or this rank's slice of it -> `[seq, ...]`. The backward pass sums over the ranks."""
        return gather_and_reduce_grad(x, self.axis) if self.sequence_parallel else copy_to(x, self.axis)

    def leave(self, x: Tensor) -> Tensor:
        """Leave a region: sum the ranks' partial results `[seq, ...]` -> `[seq, ...]`, or this rank's slice of it."""
        return reduce_scatter_to(x, self.axis) if self.sequence_parallel else reduce_from(x, self.axis)

    def join(self, x: Tensor) -> Tensor:
        """Join the ranks' slices between the regions -> `[seq, ...]`, for work that all ranks do equally."""
        return gather_from(x, self.axis, 0) if self.sequence_parallel else x

    def enter_async(self, x: Tensor) -> CollectiveWork:
        """Start the forward collective of `enter`, for layers with their own backward pass; also the backward of `leave`."""
        return all_gather_async(x, self.axis) if self.sequence_parallel else CollectiveWork(None, lambda: x)

    def leave_async(self, x: Tensor) -> CollectiveWork:
        """Start the forward collective of `leave`, possibly in place; also the backward of `enter`."""
        return reduce_scatter_async(x, self.axis) if self.sequence_parallel else all_reduce_async(x, self.axis)

    def parameter(self, *shape: int, init: str, decay: bool = True) -> nn.Parameter:
        """Return a parameter that is whole on every rank, for work between the regions.

        Under sequence parallelism each rank uses it only for its slice of the sequence, so its gradients are summed over ranks.

        Args:
            shape: shape of the parameter.
            init: name of the rule in `model/init.py` that initialises it.
            decay: whether weight decay applies.
        """
        axes = frozenset({self.axis.name}) if self.sequence_parallel else frozenset[str]()
        spec = ParameterSpec("", shape, Part.whole(shape), sum_grad_over=axes, decay=decay, init=init)
        return describe(nn.Parameter(torch.empty(shape)), spec)

    def slice_parameter(self, shape: tuple[int, ...], part: Part, *, init: str = "normal", decay: bool = True) -> nn.Parameter:
        """Return this rank's `part` of a parameter of `shape` that is divided over the ranks.

        Args:
            shape: shape of the whole parameter.
            part: this rank's rectangle.
            init: name of the rule in `model/init.py` that initialises it.
            decay: whether weight decay applies.
        """
        spec = ParameterSpec("", shape, part, frozenset({self.axis.name}), decay=decay, init=init)
        return describe(nn.Parameter(torch.empty(part.shape)), spec)
