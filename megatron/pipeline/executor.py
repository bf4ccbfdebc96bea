"""Runs the forward and backward work of one step. The only place that moves activations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megatron.contract import Batch, Loss


@dataclass(frozen=True)
class StepOutput:
    """Totals over this rank's micro-batches, fp32 scalars without a graph; zero on stages that have no head.

    loss: sum of the token losses that count; tokens: how many count; means: sum of the micro-batches' mean losses.
    """

    loss: Tensor
    tokens: Tensor
    means: Tensor


class Executor:
    """Forward and backward over micro-batches, on the one stage there is: F0 B0 F1 B1 ...

    objective: micro-batch loss -> the scalar to differentiate, already divided by what the step averages over.
    """

    def __init__(self, stage: nn.Module, objective: Callable[[Loss, int], Tensor], device: torch.device) -> None:
        self.stage, self.objective, self.device = stage, objective, device

    def step(self, batches: Sequence[Batch]) -> StepOutput:
        """Add the gradients of all micro-batches to the parameters' gradients."""
        return self._run(batches, backward=True)

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch]) -> StepOutput:
        """Forward only, dropout off."""
        self.stage.eval()
        try:
            return self._run(batches, backward=False)
        finally:
            self.stage.train()

    def _run(self, batches: Sequence[Batch], *, backward: bool) -> StepOutput:
        totals = torch.zeros(3, device=self.device)
        for batch in batches:
            loss = self.stage(None, batch.to(self.device))
            if backward:
                self.objective(loss, len(batches)).backward()  # type: ignore[no-untyped-call]
            value, tokens = loss.sum.detach(), loss.tokens
            totals += torch.stack([value, tokens, value / tokens.clamp(min=1.0)])
        return StepOutput(*totals.unbind())
