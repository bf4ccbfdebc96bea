"""New weights to all data-parallel ranks: after the update, or during the next forward pass.

Under the distributed optimizer each rank has updated its slice of every bucket and needs the others'. A bucket's gather can
run while layers compute that do not need it: modules wait for the buckets of their own parameters when they are called.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from megatron.optim.buffers import FlatBuffer
from megatron.parallel.collectives import CollectiveWork


class ParamGatherer:
    """Gathers the weights of all buckets. overlap: `all_started` returns before they are here."""

    def __init__(self, buffers: Sequence[FlatBuffer], *, overlap: bool = False) -> None:
        self.buffers, self.overlap = list(buffers), overlap
        self._pending: dict[int, CollectiveWork] = {}

    def start(self, number: int) -> None:
        """Give every rank the new weights of a bucket, in the same order on all of them. Collective."""
        self._pending[number] = self.buffers[number].all_gather_params_async()

    def all_started(self) -> None:
        """Say that all buckets were started. With overlap, whoever reads weights calls `finish` before."""
        if not self.overlap:
            self.finish()

    def finish(self) -> None:
        """Wait for all that is under way."""
        self._wait(list(self._pending))

    def wait_before(self, module: nn.Module, parameters: Iterable[Tensor]) -> None:
        """Let each later call of `module` first wait for the buckets of `parameters`."""
        wanted = {id(p) for p in parameters}
        needed = [n for n, b in enumerate(self.buffers) if any(id(p) in wanted for p in b.parameters)]

        @torch.compiler.disable  # type: ignore[untyped-decorator]  # a compiled module goes around what communicates
        def wait(*_: object) -> None:
            self._wait(needed)

        module.register_forward_pre_hook(wait)

    def _wait(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            if number in self._pending:
                self._pending.pop(number).wait()


def wait_in_turn(gatherer: ParamGatherer, modules: Sequence[nn.Module], parameters: Sequence[Tensor]) -> None:
    """Let each of `modules`, which are called in this order, wait for its own parameters.

    Args:
        gatherer: gathers the parameters' buckets.
        modules: in the order of the forward pass.
        parameters: all that the modules' forward passes need, and what follows them. Those of no module wait with the last one.
    """
    own = {id(p) for module in modules for p in module.parameters()}
    for module in modules:
        rest = [p for p in parameters if id(p) not in own] if module is modules[-1] else []
        gatherer.wait_before(module, [*module.parameters(), *rest])
