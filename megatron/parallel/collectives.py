"""Collectives along one axis of the mesh: plain ones, and six differentiable ones, in pairs that are each other's backward.

                              forward           backward
    copy_to                   identity          all-reduce
    reduce_from               all-reduce        identity
    scatter_to                slice             all-gather
    gather_from               all-gather        slice
    reduce_scatter_to         reduce-scatter    all-gather
    gather_and_reduce_grad    all-gather        reduce-scatter

`copy_to`/`reduce_from` are f and g of arXiv 1909.08053, `gather_and_reduce_grad`/`reduce_scatter_to` g and g-bar of 2205.05198.
On an axis of size 1 every function returns its argument. In the shapes below, n is the number of ranks of the axis.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.mesh.mesh import Axis
from megatron.mesh.shared_collectives import SharedGroup

# torch 2.13 renamed these two; 2.11 and 2.12 only know the older names.
_gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_into = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class CollectiveWork:
    """A collective in progress, like torch.distributed's Work, except that `wait` returns the result."""

    def __init__(self, work: Any, result: Callable[[], Tensor]) -> None:
        self._work, self._result = work, result

    def wait(self) -> Tensor:
        """Wait for the collective, and return its result."""
        if self._work is not None:
            self._work.wait()
        return self._result()


def _needs_host(x: Tensor, axis: Axis) -> bool:
    """Return whether `x` must go through host memory, since gloo supports few collectives on GPU tensors."""
    return x.is_cuda and dist.get_backend(axis.group) == "gloo"


def _shared(x: Tensor, axis: Axis) -> SharedGroup | None:
    """Return the group in shared memory that `x` can go through; None where that is not there, or `x` is on a GPU."""
    return None if x.is_cuda else axis.shared


def all_reduce_async(x: Tensor, axis: Axis) -> CollectiveWork:
    """Start to sum `x` `[...]` over the axis, in place; the result is `x`."""
    if axis.size == 1:
        return CollectiveWork(None, lambda: x)
    if shared := _shared(x, axis):
        return CollectiveWork(shared.all_reduce(x), lambda: x)
    if _needs_host(x, axis):
        host = x.cpu()  # [...]
        dist.all_reduce(host, group=axis.group)
        return CollectiveWork(None, lambda: x.copy_(host))
    return CollectiveWork(dist.all_reduce(x, group=axis.group, async_op=True), lambda: x)


def all_gather_async(x: Tensor, axis: Axis) -> CollectiveWork:
    """Start to concatenate the ranks' `x` along dimension 0: `[m, ...] -> [m * n, ...]`."""
    if axis.size == 1:
        return CollectiveWork(None, lambda: x)
    device = x.device
    x = x.cpu() if _needs_host(x, axis) else x.contiguous()
    whole = x.new_empty((x.shape[0] * axis.size, *x.shape[1:]))  # [m * n, ...]
    if shared := _shared(x, axis):
        return CollectiveWork(shared.all_gather(x, whole), lambda: whole)
    work = _gather_into(whole, x, group=axis.group, async_op=True)
    return CollectiveWork(work, lambda: whole.to(device))


def reduce_scatter_async(x: Tensor, axis: Axis) -> CollectiveWork:
    """Start to sum over the axis and keep this rank's share of dimension 0: `[m * n, ...] -> [m, ...]`."""
    if axis.size == 1:
        return CollectiveWork(None, lambda: x)
    device = x.device
    x = x.cpu() if _needs_host(x, axis) else x.contiguous()
    share = x.new_empty((x.shape[0] // axis.size, *x.shape[1:]))  # [m, ...]
    if shared := _shared(x, axis):
        return CollectiveWork(shared.reduce_scatter(x, share), lambda: share)
    work = _reduce_scatter_into(share, x, group=axis.group, async_op=True)
    return CollectiveWork(work, lambda: share.to(device))


def reduce_slices_async(x: Tensor, axis: Axis) -> CollectiveWork:
    """Start to sum `x` `[m * n]` over the axis, in place: only this rank's share `[m]` holds the sum, the rest is undefined."""
    if axis.size == 1:
        return CollectiveWork(None, lambda: x)
    if shared := _shared(x, axis):
        return CollectiveWork(shared.reduce_scatter(x, own_slice(x, axis)), lambda: x)
    if _needs_host(x, axis):
        return all_reduce_async(x, axis)
    if dist.get_backend(axis.group) == "gloo":  # its reduce-scatter is an all-reduce of a copy
        shares = zip(x.view(axis.size, -1), axis.ranks, strict=True)  # each [m]
        return CollectiveWork(
            _AllWorks([dist.reduce(y, rank, group=axis.group, async_op=True) for y, rank in shares]), lambda: x
        )
    share = own_slice(x, axis)  # [m], a view: the sum lands in place
    return CollectiveWork(_reduce_scatter_into(share, x, group=axis.group, async_op=True), lambda: share)


def gather_slices_async(x: Tensor, axis: Axis) -> CollectiveWork:
    """Start to fill `x` `[m * n]` from the ranks' shares of it, in place; the reverse of `reduce_slices_async`."""
    if axis.size == 1:
        return CollectiveWork(None, lambda: x)
    if shared := _shared(x, axis):
        return CollectiveWork(shared.all_gather(own_slice(x, axis), x), lambda: x)
    if _needs_host(x, axis):
        gathering = all_gather_async(own_slice(x, axis), axis)  # [m] -> [m * n]
        return CollectiveWork(None, lambda: x.copy_(gathering.wait()))
    if dist.get_backend(axis.group) == "gloo":  # its all-gather takes half as long again as a broadcast from each rank
        shares = zip(x.view(axis.size, -1), axis.ranks, strict=True)  # each [m]
        return CollectiveWork(
            _AllWorks([dist.broadcast(y, rank, group=axis.group, async_op=True) for y, rank in shares]), lambda: x
        )
    return CollectiveWork(_gather_into(x, own_slice(x, axis), group=axis.group, async_op=True), lambda: x)


class _AllWorks:
    """Several transfers in progress, waited for as one."""

    def __init__(self, works: Sequence[Any], sent: Tensor | None = None) -> None:
        self._works, self._sent = works, sent  # keeps the sent tensor alive until the transfer has ended

    def wait(self) -> None:
        for work in self._works:
            work.wait()


def ring_shift_async(x: Tensor, axis: Axis) -> CollectiveWork:
    """Start to send `x` `[...]` to the next rank of the ring, and to receive the previous rank's, which is the result."""
    if axis.size == 1:
        return CollectiveWork(None, lambda: x)
    device = x.device
    x = x.cpu() if _needs_host(x, axis) else x.contiguous()
    received = torch.empty_like(x)  # [...]
    if shared := _shared(x, axis):
        return CollectiveWork(shared.ring_shift(x, received), lambda: received)
    following, previous = axis.ranks[(axis.rank + 1) % axis.size], axis.ranks[axis.rank - 1]
    # As one batch: where transfers run in order, all ranks could otherwise wait in a send with no receive posted.
    transfers = [dist.P2POp(dist.isend, x, following, axis.group), dist.P2POp(dist.irecv, received, previous, axis.group)]
    return CollectiveWork(_AllWorks(dist.batch_isend_irecv(transfers), x), lambda: received.to(device))


def all_reduce(x: Tensor, axis: Axis, op: str = "sum") -> Tensor:
    """Reduce `x` `[...]` over the axis in place and return it.

    Args:
        x: `[...]`, of the same shape on all ranks.
        axis: the ranks.
        op: "sum" or "max".
    """
    if op == "sum":
        return all_reduce_async(x, axis).wait()
    if shared := _shared(x, axis):
        shared.all_reduce(x, torch.maximum).wait()
    elif axis.size > 1:
        host = x.cpu() if _needs_host(x, axis) else x
        dist.all_reduce(host, op=dist.ReduceOp.MAX, group=axis.group)
        if host is not x:
            x.copy_(host)
    return x


def all_gather(x: Tensor, axis: Axis, dim: int = 0) -> Tensor:
    """Concatenate the ranks' `x` along `dim`: `[..., m, ...] -> [..., m * n, ...]`.

    Args:
        x: `[...]`, of the same shape on all ranks.
        axis: the ranks.
        dim: the dimension of the concatenation.
    """
    if axis.size == 1:
        return x
    if dim == 0:
        return all_gather_async(x, axis).wait()
    return all_gather_async(x.movedim(dim, 0), axis).wait().movedim(0, dim)


def reduce_scatter(x: Tensor, axis: Axis, dim: int = 0) -> Tensor:
    """Sum over the axis, and keep this rank's share of `dim`: `[..., m * n, ...] -> [..., m, ...]`.

    Args:
        x: `[...]`, of the same shape on all ranks.
        axis: the ranks.
        dim: the dimension that is divided over the ranks.
    """
    if axis.size == 1:
        return x
    if dim == 0:
        return reduce_scatter_async(x, axis).wait()
    return reduce_scatter_async(x.movedim(dim, 0), axis).wait().movedim(0, dim)


def own_slice(x: Tensor, axis: Axis, dim: int = 0) -> Tensor:
    """Return this rank's share of `dim` as a view: `[..., m * n, ...] -> [..., m, ...]`. No communication.

    Args:
        x: the same tensor on all ranks.
        axis: the ranks.
        dim: the dimension that is divided over the ranks.
    """
    share = x.shape[dim] // axis.size
    return x.narrow(dim, axis.rank * share, share)


class _Mapped(torch.autograd.Function):
    """Applies one collective in the forward pass, and its conjugate in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: Callable[[Tensor], Tensor], backward: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.conjugate = backward
        return forward(x)  # for the shapes see the table of functions below

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.conjugate(grads[0]), None, None


def _mapped(x: Tensor, axis: Axis, forward: Callable[[Tensor], Tensor], backward: Callable[[Tensor], Tensor]) -> Tensor:
    if axis.size == 1:
        return x
    result: Tensor = _Mapped.apply(x, forward, backward)  # type: ignore[no-untyped-call]
    return result


def _alias(x: Tensor) -> Tensor:
    return x.view_as(x)  # autograd requires the output to be another tensor object than the input


def _sum_copy(x: Tensor, axis: Axis) -> Tensor:
    """Return the sum over the axis `[...]`, without changing the argument."""
    return all_reduce(x.clone(memory_format=torch.contiguous_format), axis)


def copy_to(x: Tensor, axis: Axis) -> Tensor:
    """Enter a region in which each rank computes its part of a sum from `x` `[...]`: f of arXiv 1909.08053."""
    return _mapped(x, axis, _alias, lambda g: _sum_copy(g, axis))


def reduce_from(x: Tensor, axis: Axis) -> Tensor:
    """Leave the region that `copy_to` entered: sum the ranks' parts `[...]`; g of arXiv 1909.08053."""
    return _mapped(x, axis, lambda y: _sum_copy(y, axis), _alias)


def scatter_to(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """Keep this rank's slice of a tensor that all ranks hold: `[..., m * n, ...] -> [..., m, ...]`.

    Args:
        x: the same tensor on all ranks.
        axis: the ranks.
        dim: the dimension that is divided over the ranks.
    """
    return _mapped(x, axis, lambda y: own_slice(y, axis, dim).contiguous(), lambda g: all_gather(g, axis, dim))


def gather_from(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """Concatenate the slices into a tensor that all ranks use in the same way: `[..., m, ...] -> [..., m * n, ...]`.

    The gradient is then the same on all ranks, and each keeps its slice of it.

    Args:
        x: this rank's slice.
        axis: the ranks.
        dim: the dimension that is divided over the ranks.
    """
    return _mapped(x, axis, lambda y: all_gather(y, axis, dim), lambda g: own_slice(g, axis, dim).contiguous())


def reduce_scatter_to(x: Tensor, axis: Axis, dim: int = 0) -> Tensor:
    """Sum the ranks' parts, and keep this rank's slice of the sum: `[..., m * n, ...] -> [..., m, ...]`.

    Args:
        x: this rank's part of the sum.
        axis: the ranks.
        dim: the dimension that is divided over the ranks.
    """
    return _mapped(x, axis, lambda y: reduce_scatter(y, axis, dim), lambda g: all_gather(g, axis, dim))


def gather_and_reduce_grad(x: Tensor, axis: Axis, dim: int = 0) -> Tensor:
    """Concatenate the slices into a tensor from which each rank computes a part of a sum: `[..., m, ...] -> [..., m * n, ...]`.

    Each rank then has a part of the gradient. The parts are summed, and each rank keeps its slice of the sum.

    Args:
        x: this rank's slice.
        axis: the ranks.
        dim: the dimension that is divided over the ranks.
    """
    return _mapped(x, axis, lambda y: all_gather(y, axis, dim), lambda g: reduce_scatter(g, axis, dim))
