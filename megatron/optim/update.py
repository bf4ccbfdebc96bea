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
    """An optimizer of torch's kind over fp32 tensors, one group each; its state is there from the beginning.

    groups: torch's parameter groups, each with one tensor. ImportError when apex is asked for and not installed.
    """

    def __init__(self, config: OptimConfig, groups: Iterable[dict[str, Any]]) -> None:
        self.adam = config.optimizer == "adam"
        self.state_names = ("exp_avg", "exp_avg_sq") if self.adam else ("momentum_buffer",)
        self.torch = _adam(config, list(groups)) if self.adam else _sgd(config, list(groups))
        self._in_groups = self.adam and config.adam_kernel == "apex"  # apex counts steps once a group
        for group in self.torch.param_groups:
            for main in group["params"]:
                state = self.torch.state[main]
                state.update({name: torch.zeros_like(main) for name in self.state_names})
                if self.adam and not self._in_groups:
                    state["step"] = torch.zeros((), device=main.device)

    def step(self, lr: float, weight_decay: float) -> None:
        """One update of every group: `lr` times its scale, and the decay where it has any."""
        for group in self.torch.param_groups:
            group["lr"] = lr * group["lr_scale"]
            group["weight_decay"] = weight_decay if group["decay"] else 0.0
        self.torch.step()

    def state(self, number: int) -> dict[str, Tensor]:
        """The moments of group `number`, by name: live, of the length of its tensor."""
        state = self.torch.state[self.torch.param_groups[number]["params"][0]]
        return {name: state[name] for name in self.state_names}

    @property
    def steps(self) -> int:
        """Updates made so far; 0 where the method does not count them."""
        group = self.torch.param_groups[0]
        kept = group if self._in_groups else self.torch.state[group["params"][0]]
        return int(kept.get("step", 0))

    @steps.setter
    def steps(self, count: int) -> None:
        for group in self.torch.param_groups:
            if self._in_groups:
                group["step"] = count
            elif self.adam:
                self.torch.state[group["params"][0]]["step"].fill_(count)


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
