"""Sum gradients over each bucket's data axis, with one collective per bucket: after the backward passes, or during them.

A bucket is complete when the last gradient of the last micro-batch has been added to it. That moment is found by counting: a
hook on every parameter counts the gradients added to its bucket, every micro-batch adds the same number of them, and the number
of micro-batches is known when a step begins. The first step only counts. From the second step on, a bucket's reduction starts
while the backward pass computes the gradients of the next bucket, under any pipeline schedule.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from megatron.optim.buffers import FlatBuffer
from megatron.parallel.collectives import CollectiveWork, all_reduce_async, reduce_slices_async
from megatron.parallel.spec import register_grad_ready_hook


class GradReducer:
    """Sums the gradients of all buckets, each over its data axis.

    overlap: start the collectives during the backward passes. Buckets always start in the order of `buffers`, because the ranks
    of a group must start their collectives in the same order.
    """

    def __init__(self, buffers: Sequence[FlatBuffer], *, overlap: bool = False) -> None:
        self.buffers = list(buffers)
        self.overlap = overlap and any(buffer.data_axis.size > 1 for buffer in self.buffers)
        self.started_early = 0  # buckets of the last step whose reduction began before `finish`
        self._micro_batches: int | None = None
        self._per_micro_batch: list[int] | None = None
        self._added = [0] * len(self.buffers)
        self._pending: list[CollectiveWork] = []
        if self.overlap:
            for number, buffer in enumerate(self.buffers):
                for parameter in buffer.parameters:
                    register_grad_ready_hook(parameter, self._grad_ready_hook(number))

    def begin(self, micro_batches: int | None) -> None:
        """Begin a step. micro_batches: their number in the step; None if unknown, so that nothing starts before `finish`."""
        for work in self._pending:  # left by a step that was aborted
            work.wait()
        self._micro_batches, self._added, self._pending = micro_batches, [0] * len(self.buffers), []

    def finish(self) -> None:
        """Reduce the remaining buckets and wait for all: `own_grads` of every bucket is then complete. Collective."""
        self.started_early = len(self._pending)
        for buffer in self.buffers[len(self._pending) :]:
            self._start(buffer)
        for work in self._pending:
            work.wait()
        # The first step with a known number of micro-batches measures how many gradients each of them adds.
        if self.overlap and self._micro_batches and self._per_micro_batch is None:
            self._per_micro_batch = [self._divide_by_micro_batches(added, self._micro_batches) for added in self._added]
        self._micro_batches, self._pending = None, []

    @staticmethod
    def _divide_by_micro_batches(added: int, micro_batches: int) -> int:
        if added % micro_batches:
            raise RuntimeError(
                f"{micro_batches} micro-batches added {added} gradients to a bucket, so they did not add the same number each; "
                "leave out --overlap-grad-reduce"
            )
        return added // micro_batches

    def _start(self, buffer: FlatBuffer) -> None:
        # A rank that owns a slice needs only the sum of that slice: a reduce-scatter, half of an all-reduce's traffic.
        start = reduce_slices_async if buffer.owners.size > 1 else all_reduce_async
        self._pending.append(start(buffer.grads, buffer.data_axis))

    def _grad_ready_hook(self, number: int) -> Callable[[], None]:
        def grad_ready() -> None:
            self._added[number] += 1
            if self._micro_batches is None or self._per_micro_batch is None:
                return
            if number < len(self._pending):
                raise RuntimeError("internal error: a gradient was added to a bucket whose reduction had already started")
            # In the order of the buckets: a complete bucket waits until all earlier ones are complete.
            while len(self._pending) < len(self.buffers) and self._is_complete(len(self._pending)):
                self._start(self.buffers[len(self._pending)])

        return grad_ready

    def _is_complete(self, number: int) -> bool:
        per_micro_batch = (self._per_micro_batch or [0])[number]
        return self._added[number] == per_micro_batch * (self._micro_batches or 0)
