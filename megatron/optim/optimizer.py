"""The update, in named phases: reduce, scale, clip, step, publish.

The arithmetic of the step is torch's own fused AdamW or SGD, run over the flat main weights: one kernel for all
parameters that decay and one for the rest. What this file owns is which gradients are summed over which axis, the norm,
and that all ranks take or skip a step together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megatron.config.schema import OptimConfig
from megatron.mesh.mesh import Axis, Mesh
from megatron.optim.buffers import FlatBuffer
from megatron.optim.norm import count_zeros, counted, global_norm
from megatron.parallel.collectives import all_reduce, start_all_reduce
from megatron.parallel.spec import Shard, spec_of

CLIP_EPSILON = 1e-6  # Megatron-LM's: coefficient = limit / (norm + epsilon)


@dataclass(frozen=True)
class UpdateReport:
    """What a step did. grad_norm: before clipping. skipped: the gradient was not finite, and no weight changed."""

    grad_norm: float
    skipped: bool
    zeros: int | None = None
    params_norm: float | None = None


class Optimizer:
    """AdamW or SGD over flat buffers, with fp32 state. Knows no model: parameters tell what they need by their spec."""

    def __init__(
        self,
        buffers: Sequence[FlatBuffer],
        config: OptimConfig,
        mesh: Mesh,
        *,
        log_zeros: bool = False,
        log_params_norm: bool = False,
    ) -> None:
        self.buffers, self.config, self.mesh = list(buffers), config, mesh
        self.log_zeros, self.log_params_norm = log_zeros, log_params_norm
        groups = []
        for buffer in self.buffers:
            main = nn.Parameter(buffer.main)
            main.grad = buffer.grads
            groups.append({"params": [main], "decay": spec_of(buffer.parameters[0]).decay})
        self.torch: torch.optim.Optimizer
        if config.optimizer == "adam":
            betas = (config.adam_beta1, config.adam_beta2)
            self.torch = torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=config.adam_eps, fused=True)
            self.state_names: tuple[str, ...] = ("exp_avg", "exp_avg_sq")
        else:
            self.torch = torch.optim.SGD(groups, lr=0.0, momentum=config.sgd_momentum, fused=True)
            self.state_names = ("momentum_buffer",)
        for group in self.torch.param_groups:  # made now, not at the first step, so that a checkpoint can fill it
            for main in group["params"]:
                state = self.torch.state[main]
                state.update({name: torch.zeros_like(main) for name in self.state_names})
                if config.optimizer == "adam":
                    state["step"] = torch.zeros((), device=main.device)

    def zero(self) -> None:
        """Forget the gradients of the last step."""
        for buffer in self.buffers:
            buffer.grads.zero_()

    def step(self, *, lr: float, weight_decay: float, scale: float) -> UpdateReport:
        """One update. Collective. scale: what the accumulated gradients are multiplied with before anything else."""
        self._reduce()
        if scale != 1.0:
            for buffer in self.buffers:
                buffer.grads.mul_(scale)
        tensors = counted(self.buffers, [b.grads for b in self.buffers], self.mesh)
        norm = float(global_norm(tensors, self.mesh))
        zeros = count_zeros(tensors, self.mesh) if self.log_zeros else None
        finite = math.isfinite(norm)
        if finite:
            self._clip(norm)
            for group in self.torch.param_groups:
                group["lr"], group["weight_decay"] = lr, weight_decay if group["decay"] else 0.0
            self.torch.step()
            for buffer in self.buffers:
                buffer.publish()
        params_norm = None
        if self.log_params_norm:
            params_norm = float(global_norm(counted(self.buffers, [b.main for b in self.buffers], self.mesh), self.mesh))
        return UpdateReport(norm, not finite, zeros, params_norm)

    def _reduce(self) -> None:
        """Sum the gradients: over axes whose copies saw different work, and over data-parallel ranks.

        The copies of a tied matrix come last: whatever order the data-parallel sums of the two stages took, a sum of two
        is the same on both, so the copies stay equal bit for bit.
        """
        self._sum_copies(self.mesh.tp)
        reducing = [start_all_reduce(buffer.grads, self.mesh.dp_cp) for buffer in self.buffers]
        for each in reducing:
            each.wait()
        self._sum_copies(self.mesh.embedding)

    def _sum_copies(self, axis: Axis) -> None:
        """One all-reduce for all parameters whose gradients are summed over `axis`."""
        views = [
            view
            for buffer in self.buffers
            for p, view in zip(buffer.parameters, buffer.views(buffer.grads), strict=True)
            if axis.name in spec_of(p).sum_grad_over
        ]
        if not views or axis.size == 1:
            return
        flat = all_reduce(torch.cat([view.flatten() for view in views]), axis)
        totals = torch.split(flat, [view.numel() for view in views])
        for view, total in zip(views, totals, strict=True):
            view.copy_(total.view_as(view))

    def _clip(self, norm: float) -> None:
        limit = self.config.clip_grad
        coefficient = limit / (norm + CLIP_EPSILON)
        if limit > 0.0 and coefficient < 1.0:
            for buffer in self.buffers:
                buffer.grads.mul_(coefficient)

    # Checkpoints: moments under the parameters' global names; the step count is one number.

    def _states(self) -> Iterator[tuple[FlatBuffer, dict[str, Tensor]]]:
        for buffer, group in zip(self.buffers, self.torch.param_groups, strict=True):
            yield buffer, self.torch.state[group["params"][0]]

    def shards(self) -> Iterator[Shard]:
        for buffer, state in self._states():
            for name in self.state_names:
                yield from buffer.shards(state[name], f"{name}.")

    def scalars(self) -> dict[str, Any]:
        steps = [int(state["step"].item()) for _, state in self._states() if "step" in state]
        return {"optimizer": self.config.optimizer, "step": steps[0] if steps else 0}

    def load_scalars(self, values: Mapping[str, Any]) -> None:
        for _, state in self._states():
            if "step" in state:
                state["step"].fill_(values["step"])
