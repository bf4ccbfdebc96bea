"""The optimizer step, in phases: reduce, scale, clip, update, gather.

The update runs a library's kernel (`optim/update.py`) on the flat main weights, once for each bucket; it scales and clips the
gradient while reading it. While one bucket is updated, the previous one is already being gathered.
This file decides which gradients are summed over which axis, and ensures that all ranks take or skip a step together.
Under the distributed optimizer (ZeRO-1, arXiv 1910.02054) every phase works on this rank's slices of the buckets; without
it each slice is the whole bucket, and nothing else differs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron.config.optimizers import rule_for
from megatron.config.schema import OptimConfig
from megatron.mesh.mesh import Axis, Mesh
from megatron.optim.buffers import FlatBuffer
from megatron.optim.gather import ParamGatherer
from megatron.optim.norm import LocalTensors, count_zeros, global_norm
from megatron.optim.reduction import GradReducer
from megatron.optim.update import ShardedUpdate, Target
from megatron.parallel.collectives import all_reduce
from megatron.parallel.spec import Shard, param_spec

CLIP_EPSILON = 1e-6  # as in Megatron-LM: coefficient = limit / (norm + epsilon)


@dataclass(frozen=True)
class UpdateReport:
    """Report of a step. grad_norm: before clipping. skipped: the gradient was not finite, so no weight was updated."""

    grad_norm: float
    skipped: bool
    zeros: int | None = None
    params_norm: float | None = None


class Optimizer:
    """An optimizer of `config/optimizers.py` over flat buffers, with fp32 state.

    It depends on no model and no particular axis: each parameter's spec states what it needs.

    overlap_grad_reduce: sum gradients over data-parallel ranks during the backward passes (see `GradReducer`).
    overlap_param_gather: `step` returns before the other ranks' weights have arrived; before reading weights, call
    `gatherer.finish()` or make the modules wait (see `ParamGatherer`).
    """

    def __init__(
        self,
        buffers: Sequence[FlatBuffer],
        config: OptimConfig,
        mesh: Mesh,
        *,
        log_zeros: bool = False,
        log_params_norm: bool = False,
        overlap_grad_reduce: bool = False,
        overlap_param_gather: bool = False,
    ) -> None:
        self.buffers, self.config, self.mesh = list(buffers), config, mesh
        self.log_zeros, self.log_params_norm = log_zeros, log_params_norm
        self.reducer = GradReducer(self.buffers, overlap=overlap_grad_reduce)
        self.gatherer = ParamGatherer(self.buffers, overlap=overlap_param_gather)
        self.update = ShardedUpdate(config, [self._target(buffer) for buffer in self.buffers])
        self._grads = LocalTensors.from_slices(self.buffers, [buffer.own_grads for buffer in self.buffers], mesh)
        self._extra_sums = list(self._find_extra_sums())
        self._main_weights = LocalTensors.from_slices(self.buffers, [buffer.main for buffer in self.buffers], mesh)

    def _target(self, buffer: FlatBuffer) -> Target:
        """Return the update target for this rank's slice of a bucket. ValueError if its parameters have different rules."""
        specs = [param_spec(p) for p in buffer.parameters]
        rules = {rule_for(self.config.optimizer, spec.name, spec.shape) for spec in specs}
        if len(rules) > 1:
            raise ValueError(f"a bucket was not laid out for the optimizer {self.config.optimizer}: it has {len(rules)} rules")
        (rule,) = rules
        decay, decoupled = specs[0].decay, specs[0].decoupled
        return Target(buffer.main, decay, decoupled, rule.method, buffer.whole_params, self.mesh.axis)

    def zero(self, micro_batches: int | None = None) -> None:
        """Zero the gradients for a new step. micro_batches: their number in the step, for --overlap-grad-reduce."""
        self.reducer.begin(micro_batches)
        for buffer in self.buffers:
            buffer.grads.zero_()

    def step(self, *, lr: float, weight_decay: float, scale: float, decoupled_lr: float | None = None) -> UpdateReport:
        """Update the weights, unless the gradient is not finite. Collective.

        Args:
            lr: learning rate.
            weight_decay: weight decay of the parameters to which it applies.
            scale: factor of the accumulated gradients, such as the inverse of the loss scale.
            decoupled_lr: learning rate of the parameters marked as decoupled; None: `lr`.
        """
        self.gatherer.finish()
        self._reduce()
        norm = float(global_norm(self._grads, self.mesh.world)) * scale
        zeros = count_zeros(self._grads, self.mesh.world) if self.log_zeros else None
        finite = math.isfinite(norm)  # equal on all ranks, so all take or skip the step
        if finite:
            rates = (lr, lr if decoupled_lr is None else decoupled_lr)
            self.update.begin(rates, weight_decay=weight_decay, multiplier=scale * self._clip_coefficient(norm))
            # In reverse, because the last bucket has the weights that the next forward pass needs first.
            for number in reversed(range(len(self.buffers))):
                self.update.step(number, self.buffers[number].own_grads.float())  # copies only if the gradients are 16-bit
                self.gatherer.start(number)
            self.gatherer.finish_unless_overlapping()
        params_norm = float(global_norm(self._main_weights, self.mesh.world)) if self.log_params_norm else None
        return UpdateReport(norm, not finite, zeros, params_norm)

    def _reduce(self) -> None:
        """Sum the gradients over each bucket's data axis, then those of copied parameters over the axes in `sum_grad_over`.

        The copies of a tied matrix are summed after the data-parallel sums: whatever their order on the two stages, a sum of
        two terms is the same on both, so the copies stay bit-equal.
        """
        self.reducer.finish()
        for axis, views in self._extra_sums:
            self._sum_over(axis, views)

    def _find_extra_sums(self) -> Iterator[tuple[Axis, list[Tensor]]]:
        """Yield each axis of the `sum_grad_over` sets, in the same order on all ranks, with the gradients to sum over it."""
        ranges = [(param_spec(p), values) for b in self.buffers for p, _, values in b.param_ranges(b.own_grads)]
        for name in sorted({name for spec, _ in ranges for name in spec.sum_grad_over}):
            if self.mesh.axis(name).size > 1:
                yield self.mesh.axis(name), [values for spec, values in ranges if name in spec.sum_grad_over]

    def _sum_over(self, axis: Axis, views: list[Tensor]) -> None:
        """Sum `views` over `axis` in one all-reduce. All ranks of the axis have the same views in the same order."""
        flat = all_reduce(torch.cat(views), axis)  # [elements of all views]
        for view, total in zip(views, torch.split(flat, [view.numel() for view in views]), strict=True):
            view.copy_(total)

    def _clip_coefficient(self, norm: float) -> float:
        """Return the factor that reduces gradients of that norm to the clipping limit; 1 if they are within it."""
        limit = self.config.clip_grad
        return min(1.0, limit / (norm + CLIP_EPSILON)) if limit > 0.0 else 1.0

    # Checkpointable: the moments are saved under the parameters' global names, and one step count for all of them.

    def shards(self) -> Iterator[Shard]:
        for number, buffer in enumerate(self.buffers):
            for name, moment in self.update.state(number).items():
                yield from buffer.shards(moment, f"{name}.")

    def scalars(self) -> dict[str, Any]:
        return {"optimizer": self.config.optimizer, "step": self.update.steps}

    def load_scalars(self, values: Mapping[str, Any]) -> None:
        self.update.steps = values["step"]
