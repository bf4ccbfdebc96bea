"""Gradients summed over the data-parallel ranks, one collective a bucket: after the backward passes, or during them.

A bucket is complete when the last gradient of the last micro-batch was added to it. Nobody needs to know which that is:
every parameter reports each gradient that is added to it, every micro-batch adds the same number of them, and a step says
how many micro-batches it has. So the first step is counted, and from the second on a bucket's reduction starts while the
backward pass makes the gradients of the next one, whatever the pipeline's schedule.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from megatron.mesh.mesh import Axis
from megatron.optim.buffers import FlatBuffer
from megatron.parallel.collectives import Pending, start_all_reduce, start_reduce_slices
from megatron.parallel.spec import report_gradient


class Reduction:
    """The sums of all buckets' gradients over `axis`.

    overlap: start them during the backward passes. Buckets start in their own order, which is the same on all ranks of the
    axis: collectives of one group must be.
    """

    def __init__(self, buffers: Sequence[FlatBuffer], axis: Axis, *, overlap: bool = False) -> None:
        self.buffers, self.axis = list(buffers), axis
        self.overlap = overlap and axis.size > 1
        self.started_early = 0  # buckets of the last step whose reduction began before `finish`
        self._micro_batches: int | None = None
        self._per_micro_batch: list[int] | None = None
        self._added = [0] * len(self.buffers)
        self._pending: list[Pending] = []
        if self.overlap:
            for number, buffer in enumerate(self.buffers):
                for parameter in buffer.parameters:
                    report_to(parameter, self._reporter(number))

    def begin(self, micro_batches: int | None) -> None:
        """A step begins. micro_batches: how many it has; None, not said: nothing starts before `finish`."""
        for each in self._pending:  # of a step that was given up
            each.wait()
        self._micro_batches, self._added, self._pending = micro_batches, [0] * len(self.buffers), []

    def finish(self) -> None:
        """Afterwards each rank has the sums of what it owns: `own_grads` of every bucket. Collective."""
        self.started_early = len(self._pending)
        for buffer in self.buffers[len(self._pending) :]:
            self._start(buffer)
        for each in self._pending:
            each.wait()
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
        start = start_reduce_slices if buffer.axis.size > 1 else start_all_reduce
        self._pending.append(start(buffer.grads, self.axis))

    def _reporter(self, number: int) -> Callable[[], None]:
        def gradient_added() -> None:
            self._added[number] += 1
            if self._micro_batches is None or self._per_micro_batch is None:
                return
            if number < len(self._pending):
                raise RuntimeError("a gradient was added to a bucket whose sum is already under way; this is an error here")
            while len(self._pending) < len(self.buffers) and self._complete(len(self._pending)):
                self._start(self.buffers[len(self._pending)])

        return gradient_added

    def _complete(self, number: int) -> bool:
        each = (self._per_micro_batch or [0])[number]
        return self._added[number] == each * (self._micro_batches or 0)


def report_to(parameter: nn.Parameter, gradient_added: Callable[[], None]) -> None:
    """Call it after each gradient: one that autograd adds, or one that `parallel.spec.accumulate` does."""
    parameter.gradient_added = gradient_added  # type: ignore[attr-defined]

    def added(parameter: Tensor) -> None:
        report_gradient(parameter)

    parameter.register_post_accumulate_grad_hook(added)  # type: ignore[no-untyped-call]
