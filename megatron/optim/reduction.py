"""Gradients summed over each bucket's data axis, one collective a bucket: after the backward passes, or during them.

A bucket is complete when the last gradient of the last micro-batch was added to it. Nobody needs to know which that is:
a hook of every parameter counts the gradients that are added to it, every micro-batch adds the same number of them, and a
step says how many micro-batches it has. So the first step is counted, and from the second on a bucket's reduction starts
while the backward pass makes the gradients of the next one, whatever the pipeline's schedule.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from megatron.optim.buffers import FlatBuffer
from megatron.parallel.collectives import CollectiveWork, all_reduce_async, reduce_slices_async
from megatron.parallel.spec import register_grad_ready_hook


class GradReducer:
    """Sums all buckets' gradients, each over its data axis.

    overlap: start during the backward passes. Buckets start in their own order, which is the same on all ranks of a stage:
    collectives of one group must be.
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
        """Begin a step. micro_batches: how many it has; None, not said: nothing starts before `finish`."""
        for each in self._pending:  # of a step that was given up
            each.wait()
        self._micro_batches, self._added, self._pending = micro_batches, [0] * len(self.buffers), []

    def finish(self) -> None:
        """Sum what is not summed yet: `own_grads` of every bucket is complete afterwards. Collective."""
        self.started_early = len(self._pending)
        for buffer in self.buffers[len(self._pending) :]:
            self._start(buffer)
        for each in self._pending:
            each.wait()
        # The first step that says its number of micro-batches counts what one of them adds; later ones start early by it.
        if self.overlap and self._micro_batches and self._per_micro_batch is None:
            self._per_micro_batch = [self._each(added, self._micro_batches) for added in self._added]
        self._micro_batches, self._pending = None, []

    @staticmethod
    def _each(added: int, micro_batches: int) -> int:
        if added % micro_batches:
            raise RuntimeError(
                f"{added} gradients came from {micro_batches} micro-batches, so it is not known which is a bucket's last; "
                "leave out --overlap-grad-reduce"
            )
        return added // micro_batches

    def _start(self, buffer: FlatBuffer) -> None:
        # A rank that owns a slice needs the sum of that alone: half of an all-reduce's traffic.
        start = reduce_slices_async if buffer.owners.size > 1 else all_reduce_async
        self._pending.append(start(buffer.grads, buffer.data_axis))

    def _grad_ready_hook(self, number: int) -> Callable[[], None]:
        def grad_ready() -> None:
            self._added[number] += 1
            if self._micro_batches is None or self._per_micro_batch is None:
                return
            if number < len(self._pending):
                raise RuntimeError("a gradient was added to a bucket whose sum is already under way; this is an error here")
            # In the buckets' own order: one that is complete early waits for those before it.
            while len(self._pending) < len(self.buffers) and self._complete(len(self._pending)):
                self._start(self.buffers[len(self._pending)])

        return grad_ready

    def _complete(self, number: int) -> bool:
        each = (self._per_micro_batch or [0])[number]
        return self._added[number] == each * (self._micro_batches or 0)
