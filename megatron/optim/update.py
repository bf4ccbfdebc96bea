"""The arithmetic of a step: torch's fused or foreach AdamW, apex's FusedAdam, or SGD, with state that a checkpoint can fill.

What differs between them is said here and nowhere else: where they keep the number of steps, and what they call a moment.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from megatron.config.schema import OptimConfig


class Update:
    """An optimizer of torch's kind for each of some fp32 tensors; its state is there from the beginning.

    groups: torch's parameter groups, each with one tensor. ImportError when apex is asked for and not installed.
    One optimizer each, so that an update can follow the other, with what one of them needs made and forgotten in between.
    """

    def __init__(self, config: OptimConfig, groups: Iterable[dict[str, Any]]) -> None:
        self.adam = config.optimizer == "adam"
        self.state_names = ("exp_avg", "exp_avg_sq") if self.adam else ("momentum_buffer",)
        self._in_groups = self.adam and config.adam_kernel == "apex"  # apex counts steps once a group
        self._scales = not self.adam or config.adam_kernel == "fused"  # torch's fused kernels divide the gradient themselves
        self._multiplier = 1.0
        self._made = [_adam(config, [group]) if self.adam else _sgd(config, [group]) for group in groups]
        for optimizer in self._made:
            main = optimizer.param_groups[0]["params"][0]
            state = optimizer.state[main]
            state.update({name: torch.zeros_like(main) for name in self.state_names})
            if self.adam and not self._in_groups:
                state["step"] = torch.zeros((), device=main.device)

    def begin(self, rates: tuple[float, float], *, weight_decay: float, multiplier: float) -> None:
        """Say what the updates of this step have.

        Args:
            rates: the learning rate, and that of decoupled groups; each group's scale multiplies its own.
            weight_decay: of the groups that decay.
            multiplier: of all gradients.
        """
        self._multiplier = multiplier
        divisor = None
        if self._scales and multiplier != 1.0:
            device = self._made[0].param_groups[0]["params"][0].device
            divisor = torch.tensor(1.0 / multiplier, dtype=torch.float32, device=device)
        for optimizer in self._made:
            (group,) = optimizer.param_groups
            group["lr"] = rates[group["decoupled"]] * group["lr_scale"]
            group["weight_decay"] = weight_decay if group["decay"] else 0.0
            optimizer.grad_scale = divisor  # type: ignore[attr-defined]  # where torch's own gradient scaler puts it

    def step(self, number: int, grad: Tensor) -> None:
        """Update tensor `number`. grad: fp32, of its length; afterwards multiplied with what `begin` was told."""
        optimizer = self._made[number]
        main = optimizer.param_groups[0]["params"][0]
        if not self._scales and self._multiplier != 1.0:
            grad.mul_(self._multiplier)
        main.grad = grad
        optimizer.step()
        main.grad = None

    def state(self, number: int) -> dict[str, Tensor]:
        """The moments of tensor `number`, by name: live, of its length."""
        optimizer = self._made[number]
        state = optimizer.state[optimizer.param_groups[0]["params"][0]]
        return {name: state[name] for name in self.state_names}

    @property
    def steps(self) -> int:
        """Updates made so far; 0 where the method does not count them."""
        (group,) = self._made[0].param_groups
        kept = group if self._in_groups else self._made[0].state[group["params"][0]]
        return int(kept.get("step", 0))

    @steps.setter
    def steps(self, count: int) -> None:
        for optimizer in self._made:
            (group,) = optimizer.param_groups
            if self._in_groups:
                group["step"] = count
            elif self.adam:
                optimizer.state[group["params"][0]]["step"].fill_(count)


def _adam(config: OptimConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    betas = (config.adam_beta1, config.adam_beta2)
    if config.adam_kernel == "apex":
        made: torch.optim.Optimizer = import_module("apex.optimizers").FusedAdam(
            groups, lr=0.0, betas=betas, eps=config.adam_eps, adam_w_mode=True
        )
        return made
    fused = config.adam_kernel == "fused"
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=config.adam_eps, fused=fused, foreach=not fused)


def _sgd(config: OptimConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=0.0, momentum=config.sgd_momentum, fused=True)
