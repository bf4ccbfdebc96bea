"""All-gather of updated weights over the data-parallel ranks: after the update, or during the next forward pass.

Under the distributed optimizer each rank has updated its slice of every bucket and needs the slices of the others. A bucket's
gather can overlap with layers that do not need it: each module waits for the buckets of its own parameters when it is called.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from megatron.optim.buffers import FlatBuffer
from megatron.parallel.collectives import CollectiveWork


class ParamGatherer:
    """Gathers the weights of all buckets. overlap: `finish_unless_overlapping` does not wait for them."""

    def __init__(self, buffers: Sequence[FlatBuffer], *, overlap: bool = False) -> None:
        self.buffers, self.overlap = list(buffers), overlap
        self._pending: dict[int, CollectiveWork] = {}

    def start(self, number: int) -> None:
        """Start to gather the weights of bucket `number`. Collective: all ranks start the buckets in the same order."""
        self._pending[number] = self.buffers[number].all_gather_params_async()

    def finish_unless_overlapping(self) -> None:
        """Wait for the gathers, which have all been started; with overlap, return at once.

        With overlap, call `finish` before reading weights, except in modules that were passed to `add_wait_hook`.
        """
        if not self.overlap:
            self.finish()

    def finish(self) -> None:
        """Wait for all pending gathers."""
        self._wait(list(self._pending))

    def add_wait_hook(self, module: nn.Module, parameters: Iterable[Tensor]) -> None:
        """Make every later call of `module` wait first for the buckets of `parameters`."""
        wanted = {id(p) for p in parameters}
        needed = [n for n, b in enumerate(self.buffers) if any(id(p) in wanted for p in b.parameters)]

        @torch.compiler.disable  # type: ignore[untyped-decorator]  # waiting for communication must not be compiled
        def wait(*_: object) -> None:
            self._wait(needed)

        module.register_forward_pre_hook(wait)

    def _wait(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            if number in self._pending:
                self._pending.pop(number).wait()


def register_wait_hooks(gatherer: ParamGatherer, modules: Sequence[nn.Module], parameters: Sequence[Tensor]) -> None:
    """Make each module wait for its own parameters when it is called.

    Args:
        gatherer: gatherer of the parameters' buckets.
        modules: modules in the order of the forward pass.
        parameters: all parameters that the forward pass needs. The last module also waits for those in none of `modules`.
    """
    module_params = {id(p) for module in modules for p in module.parameters()}
    for module in modules:
        rest = [p for p in parameters if id(p) not in module_params] if module is modules[-1] else []
        gatherer.add_wait_hook(module, [*module.parameters(), *rest])
