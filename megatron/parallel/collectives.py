"""Collectives along one axis: plain ones, and six differentiable ones in pairs that are each other's backward.

    forward                        backward
    copy_to      identity          all-reduce          reduce_from: the reverse
    split_to     slice             all-gather          gather_from: the reverse
    scatter_sum  reduce-scatter    all-gather          gather_sum:  the reverse

`copy_to`/`reduce_from` are f and g of 1909.08053, `gather_sum`/`scatter_sum` g and g-bar of 2205.05198. On an axis of
size 1 every function returns its argument.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.mesh.mesh import Axis

# torch 2.13 renamed these two; 2.11 and 2.12 only know the older names.
_gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_into = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Pending:
    """A collective under way. `wait()` gives its result."""

    def __init__(self, work: Any, result: Callable[[], Tensor]) -> None:
        self._work, self._result = work, result

    def wait(self) -> Tensor:
        """Wait for the collective; returns its result."""
        if self._work is not None:
            self._work.wait()
        return self._result()


def _needs_host(x: Tensor, axis: Axis) -> bool:
    """gloo does little on GPU memory; ranks that share a GPU for a test go through host memory."""
    return x.is_cuda and dist.get_backend(axis.group) == "gloo"


def start_all_reduce(x: Tensor, axis: Axis) -> Pending:
    """Sum `x` over the axis, in place."""
    if axis.size == 1:
        return Pending(None, lambda: x)
    if _needs_host(x, axis):
        host = x.cpu()
        dist.all_reduce(host, group=axis.group)
        return Pending(None, lambda: x.copy_(host))
    return Pending(dist.all_reduce(x, group=axis.group, async_op=True), lambda: x)


def start_all_gather(x: Tensor, axis: Axis) -> Pending:
    """Join the ranks' `x` along dimension 0: [n, ...] -> [n * size, ...]."""
    if axis.size == 1:
        return Pending(None, lambda: x)
    device = x.device
    x = x.cpu() if _needs_host(x, axis) else x.contiguous()
    whole = x.new_empty((x.shape[0] * axis.size, *x.shape[1:]))
    work = _gather_into(whole, x, group=axis.group, async_op=True)
    return Pending(work, lambda: whole.to(device))


def start_reduce_scatter(x: Tensor, axis: Axis) -> Pending:
    """Sum over the axis and keep this rank's share of dimension 0: [n * size, ...] -> [n, ...]."""
    if axis.size == 1:
        return Pending(None, lambda: x)
    device = x.device
    x = x.cpu() if _needs_host(x, axis) else x.contiguous()
    share = x.new_empty((x.shape[0] // axis.size, *x.shape[1:]))
    work = _reduce_scatter_into(share, x, group=axis.group, async_op=True)
    return Pending(work, lambda: share.to(device))


def start_reduce_slices(x: Tensor, axis: Axis) -> Pending:
    """Sum `x` `[n * size]` over the axis, in place: this rank's share of it becomes the sum, the rest nothing to rely on."""
    if axis.size == 1:
        return Pending(None, lambda: x)
    if _needs_host(x, axis):
        return start_all_reduce(x, axis)
    if dist.get_backend(axis.group) == "gloo":  # its reduce-scatter is an all-reduce of a copy
        shares = zip(x.view(axis.size, -1), axis.ranks, strict=True)
        return Pending(_All([dist.reduce(y, rank, group=axis.group, async_op=True) for y, rank in shares]), lambda: x)
    share = own_slice(x, axis)
    return Pending(_reduce_scatter_into(share, x, group=axis.group, async_op=True), lambda: share)


def start_gather_slices(x: Tensor, axis: Axis) -> Pending:
    """Fill `x` `[n * size]` from the ranks' shares of it, in place: the other way round."""
    if axis.size == 1:
        return Pending(None, lambda: x)
    if _needs_host(x, axis):
        joining = start_all_gather(own_slice(x, axis), axis)
        return Pending(None, lambda: x.copy_(joining.wait()))
    if dist.get_backend(axis.group) == "gloo":  # its all-gather takes half as long again as a broadcast from each rank
        shares = zip(x.view(axis.size, -1), axis.ranks, strict=True)
        return Pending(_All([dist.broadcast(y, rank, group=axis.group, async_op=True) for y, rank in shares]), lambda: x)
    return Pending(_gather_into(x, own_slice(x, axis), group=axis.group, async_op=True), lambda: x)


class _All:
    """Several transfers under way."""

    def __init__(self, works: Sequence[Any], leaving: Tensor | None = None) -> None:
        self._works, self._leaving = works, leaving  # a tensor must live until it has left

    def wait(self) -> None:
        for work in self._works:
            work.wait()


def start_shift(x: Tensor, axis: Axis) -> Pending:
    """Pass `x` to the next rank of the ring, get that of the rank before: the same shape and dtype on all."""
    if axis.size == 1:
        return Pending(None, lambda: x)
    device = x.device
    x = x.cpu() if _needs_host(x, axis) else x.contiguous()
    room = torch.empty_like(x)
    following, before = axis.ranks[(axis.rank + 1) % axis.size], axis.ranks[axis.rank - 1]
    # As one batch: where transfers are worked off in order, no rank may wait for a send before it has posted its receive.
    passing = [dist.P2POp(dist.isend, x, following, axis.group), dist.P2POp(dist.irecv, room, before, axis.group)]
    return Pending(_All(dist.batch_isend_irecv(passing), x), lambda: room.to(device))


def all_reduce(x: Tensor, axis: Axis, op: str = "sum") -> Tensor:
    """Reduce `x` over the axis in place and return it. op: sum or max."""
    if op == "sum":
        return start_all_reduce(x, axis).wait()
    if axis.size > 1:
        host = x.cpu() if _needs_host(x, axis) else x
        dist.all_reduce(host, op=dist.ReduceOp.MAX, group=axis.group)
        if host is not x:
            x.copy_(host)
    return x


def all_gather(x: Tensor, axis: Axis, dim: int = 0) -> Tensor:
    """Join the ranks' `x` along `dim`."""
    if axis.size == 1:
        return x
    if dim == 0:
        return start_all_gather(x, axis).wait()
    return start_all_gather(x.movedim(dim, 0), axis).wait().movedim(0, dim)


def reduce_scatter(x: Tensor, axis: Axis, dim: int = 0) -> Tensor:
    """Sum over the axis, keep this rank's share of `dim`."""
    if axis.size == 1:
        return x
    if dim == 0:
        return start_reduce_scatter(x, axis).wait()
    return start_reduce_scatter(x.movedim(dim, 0), axis).wait().movedim(0, dim)


def own_slice(x: Tensor, axis: Axis, dim: int = 0) -> Tensor:
    """This rank's share of `dim`; no communication."""
    share = x.shape[dim] // axis.size
    return x.narrow(dim, axis.rank * share, share)


class _Mapped(torch.autograd.Function):
    """One function forward, its conjugate backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: Callable[[Tensor], Tensor], backward: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.conjugate = backward
        return forward(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.conjugate(grads[0]), None, None


def _mapped(x: Tensor, axis: Axis, forward: Callable[[Tensor], Tensor], backward: Callable[[Tensor], Tensor]) -> Tensor:
    if axis.size == 1:
        return x
    result: Tensor = _Mapped.apply(x, forward, backward)  # type: ignore[no-untyped-call]
    return result


def _alias(x: Tensor) -> Tensor:
    return x.view_as(x)


def _sum_copy(x: Tensor, axis: Axis) -> Tensor:
    """All-reduce that leaves the caller's tensor alone."""
    return all_reduce(x.clone(memory_format=torch.contiguous_format), axis)


def copy_to(x: Tensor, axis: Axis) -> Tensor:
    """Enter a region where each rank uses `x` for its own part of a sum."""
    return _mapped(x, axis, _alias, lambda g: _sum_copy(g, axis))


def reduce_from(x: Tensor, axis: Axis) -> Tensor:
    """Leave it: add up the ranks' parts."""
    return _mapped(x, axis, lambda y: _sum_copy(y, axis), _alias)


def split_to(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """Keep this rank's slice of a tensor that all ranks hold."""
    return _mapped(x, axis, lambda y: own_slice(y, axis, dim).contiguous(), lambda g: all_gather(g, axis, dim))


def gather_from(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """Join the slices into a tensor that all ranks then use in the same way."""
    return _mapped(x, axis, lambda y: all_gather(y, axis, dim), lambda g: own_slice(g, axis, dim).contiguous())


def scatter_sum(x: Tensor, axis: Axis, dim: int = 0) -> Tensor:
    """Add up the ranks' parts, keep this rank's slice of the sum."""
    return _mapped(x, axis, lambda y: reduce_scatter(y, axis, dim), lambda g: all_gather(g, axis, dim))


def gather_sum(x: Tensor, axis: Axis, dim: int = 0) -> Tensor:
    """Join the slices into a tensor that each rank uses for its own part of a sum."""
    return _mapped(x, axis, lambda y: all_gather(y, axis, dim), lambda g: reduce_scatter(g, axis, dim))
