"""The update, in named phases: reduce, scale, clip, step, gather.

The arithmetic of the step is a library's (`optim/update.py`), run over the flat main weights: one kernel for each bucket,
which scales and clips the gradient as it reads it. While a bucket is updated, the one before is on its way to the others.
What this file owns is which gradients are summed over which axis, the norm, and that all ranks take or skip a step together.
Under the distributed optimizer (ZeRO-1, arXiv 1910.02054) every phase works on this rank's slices of the buckets; without
it they are the whole buckets, and nothing else differs.
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

CLIP_EPSILON = 1e-6  # Megatron-LM's: coefficient = limit / (norm + epsilon)


@dataclass(frozen=True)
class UpdateReport:
    """Report of a step. grad_norm: before clipping. skipped: the gradient was not finite, and no weight changed."""

    grad_norm: float
    skipped: bool
    zeros: int | None = None
    params_norm: float | None = None


class Optimizer:
    """An optimizer of `config/optimizers.py` over flat buffers, with fp32 state.

    It knows no model and no axis: parameters tell what they need by their spec.

    overlap_grad_reduce: sum gradients over data-parallel ranks while the backward passes run (see `GradReducer`).
    overlap_param_gather: `step` returns before the other ranks' weights are here; who reads weights calls
    `gatherer.finish()` before, or lets modules wait (see `ParamGatherer`).
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
        self._copies = list(self._gradients_of_copies())
        self._mains = LocalTensors.from_slices(self.buffers, [buffer.main for buffer in self.buffers], mesh)

    def _target(self, buffer: FlatBuffer) -> Target:
        """Return this rank's slice of a bucket as `update` sees it. ValueError when its parameters follow several rules."""
        specs = [param_spec(p) for p in buffer.parameters]
        rules = {rule_for(self.config.optimizer, spec.name, spec.shape) for spec in specs}
        if len(rules) > 1:
            raise ValueError(f"a bucket was not laid out for the optimizer {self.config.optimizer}: it has {len(rules)} rules")
        (rule,) = rules
        decay, decoupled = specs[0].decay, specs[0].decoupled
        return Target(buffer.main, decay, decoupled, rule.method, buffer.whole_params, self.mesh.axis)

    def zero(self, micro_batches: int | None = None) -> None:
        """Zero the gradient buffers. micro_batches: of the step that begins, for --overlap-grad-reduce."""
        self.reducer.begin(micro_batches)
        for buffer in self.buffers:
            buffer.grads.zero_()

    def step(self, *, lr: float, weight_decay: float, scale: float, decoupled_lr: float | None = None) -> UpdateReport:
        """Make one update. Collective.

        Args:
            lr: the learning rate.
            weight_decay: of the parameters that decay.
            scale: what the accumulated gradients are multiplied with before anything else.
            decoupled_lr: the learning rate of parameters that are decoupled; None: `lr`.
        """
        self.gatherer.finish()
        self._reduce()
        norm = float(global_norm(self._grads, self.mesh.world)) * scale
        zeros = count_zeros(self._grads, self.mesh.world) if self.log_zeros else None
        finite = math.isfinite(norm)  # equal on all ranks, so all take or skip the step
        if finite:
            rates = (lr, lr if decoupled_lr is None else decoupled_lr)
            self.update.begin(rates, weight_decay=weight_decay, multiplier=scale * self._clipping(norm))
            # What the forward pass needs first comes last in the order of the buckets.
            for number in reversed(range(len(self.buffers))):
                self.update.step(number, self.buffers[number].own_grads.float())  # of 16-bit gradients an fp32 copy
                self.gatherer.start(number)
            self.gatherer.all_started()
        params_norm = float(global_norm(self._mains, self.mesh.world)) if self.log_params_norm else None
        return UpdateReport(norm, not finite, zeros, params_norm)

    def _reduce(self) -> None:
        """Sum the gradients: over each bucket's data axis, and over axes whose copies saw different work.

        The copies of a tied matrix come after the data-parallel sums: whatever order these took on the two stages, a sum of
        two is the same on both, so the copies stay equal bit for bit.
        """
        self.reducer.finish()
        for axis, views in self._copies:
            self._sum_copies(axis, views)

    def _gradients_of_copies(self) -> Iterator[tuple[Axis, list[Tensor]]]:
        """Yield each axis that further sums are made over, in one order on all ranks, and the gradients of its parameters."""
        ranges = [(param_spec(p), values) for b in self.buffers for p, _, values in b.param_ranges(b.own_grads)]
        for name in sorted({name for spec, _ in ranges for name in spec.sum_grad_over}):
            if self.mesh.axis(name).size > 1:
                yield self.mesh.axis(name), [values for spec, values in ranges if name in spec.sum_grad_over]

    def _sum_copies(self, axis: Axis, views: list[Tensor]) -> None:
        """Sum `views` over `axis` in one all-reduce: they agree on all its ranks, which laid out their buckets alike."""
        flat = all_reduce(torch.cat(views), axis)  # [elements of all views]
        for view, total in zip(views, torch.split(flat, [view.numel() for view in views]), strict=True):
            view.copy_(total)

    def _clipping(self, norm: float) -> float:
        """Return what gradients of that norm are multiplied with."""
        limit = self.config.clip_grad
        return min(1.0, limit / (norm + CLIP_EPSILON)) if limit > 0.0 else 1.0

    # Checkpoints: moments under the parameters' global names; the step count is one number.

    def shards(self) -> Iterator[Shard]:
        for number, buffer in enumerate(self.buffers):
            for name, moment in self.update.state(number).items():
                yield from buffer.shards(moment, f"{name}.")

    def scalars(self) -> dict[str, Any]:
        return {"optimizer": self.config.optimizer, "step": self.update.steps}

    def load_scalars(self, values: Mapping[str, Any]) -> None:
        self.update.steps = values["step"]
