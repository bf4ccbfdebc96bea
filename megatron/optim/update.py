"""The arithmetic of a step: torch's fused or foreach AdamW, apex's FusedAdam, or SGD, with state that a checkpoint can fill.

What differs between them is said here and nowhere else: who divides the gradient, where the number of steps is kept, and
what a moment is called. torch's are called as functions: its optimizer classes import the compiler, seconds for each process.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from typing import Protocol

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from megatron.config.schema import OptimConfig


@dataclass(frozen=True)
class Target:
    """An fp32 tensor to update.

    decay: whether weight decay reaches it. decoupled: whether it has the rate of the embedding and output layer, where they
    have one of their own.
    """

    main: Tensor
    decay: bool
    decoupled: bool = False


@dataclass(frozen=True)
class _Factor:
    """What the gradients of a step are multiplied with: a number, and its inverse where torch's fused kernels take it."""

    value: float = 1.0
    inverse: Tensor | None = None


class _Method(Protocol):
    """One optimizer of one tensor. state: its moments by name, there from the beginning. steps: updates so far."""

    state: dict[str, Tensor]

    @property
    def steps(self) -> int: ...

    @steps.setter
    def steps(self, count: int) -> None: ...

    def step(self, grad: Tensor, factor: _Factor, *, lr: float, weight_decay: float) -> None: ...


class ShardedUpdate:
    """An optimizer for each of some fp32 tensors, this rank's slices of the buckets.

    One each, so that an update can follow the other, with what one of them needs made and forgotten in between.
    ImportError when apex is asked for and not installed.
    """

    def __init__(self, config: OptimConfig, targets: Iterable[Target]) -> None:
        self._targets = list(targets)
        self._methods = [_method(config, target.main) for target in self._targets]
        self._factor, self._rates, self._weight_decay = _Factor(), (0.0, 0.0), 0.0

    def begin(self, rates: tuple[float, float], *, weight_decay: float, multiplier: float) -> None:
        """Say what the updates of this step have.

        Args:
            rates: the learning rate, and that of decoupled targets.
            weight_decay: of the targets that decay.
            multiplier: of all gradients.
        """
        self._rates, self._weight_decay, self._factor = rates, weight_decay, _Factor()
        if multiplier != 1.0:
            device = self._targets[0].main.device
            self._factor = _Factor(multiplier, torch.tensor(1.0 / multiplier, dtype=torch.float32, device=device))

    @torch.no_grad()
    def step(self, number: int, grad: Tensor) -> None:
        """Update tensor `number`. grad: fp32, of its length; afterwards multiplied with what `begin` was told."""
        target = self._targets[number]
        weight_decay = self._weight_decay if target.decay else 0.0
        self._methods[number].step(grad, self._factor, lr=self._rates[target.decoupled], weight_decay=weight_decay)

    def state(self, number: int) -> dict[str, Tensor]:
        """The moments of tensor `number`, by name: live, of its length."""
        return self._methods[number].state

    @property
    def steps(self) -> int:
        """Updates made so far; 0 where the method does not count them."""
        return self._methods[0].steps

    @steps.setter
    def steps(self, count: int) -> None:
        for method in self._methods:
            method.steps = count


def _method(config: OptimConfig, main: Tensor) -> _Method:
    if config.optimizer == "sgd":
        return _SGD(config, main)
    return _ApexAdam(config, main) if config.adam_kernel == "apex" else _AdamW(config, main)


class _AdamW:
    """torch's, fused or foreach."""

    def __init__(self, config: OptimConfig, main: Tensor) -> None:
        self._main, self._fused = main, config.adam_kernel == "fused"
        self._config = config
        self.state = {"exp_avg": torch.zeros_like(main), "exp_avg_sq": torch.zeros_like(main)}
        self._count = torch.zeros((), device=main.device)

    def step(self, grad: Tensor, factor: _Factor, *, lr: float, weight_decay: float) -> None:
        if not self._fused and factor.inverse is not None:
            grad.mul_(factor.value)
        adamw(
            [self._main], [grad], [self.state["exp_avg"]], [self.state["exp_avg_sq"]], [], [self._count],
            fused=self._fused, foreach=not self._fused, grad_scale=factor.inverse if self._fused else None,
            beta1=self._config.adam_beta1, beta2=self._config.adam_beta2, eps=self._config.adam_eps,
            amsgrad=False, maximize=False, lr=lr, weight_decay=weight_decay,
        )  # fmt: skip

    @property
    def steps(self) -> int:
        return int(self._count)

    @steps.setter
    def steps(self, count: int) -> None:
        self._count.fill_(count)


class _SGD:
    """torch's fused SGD with momentum; it counts no steps."""

    def __init__(self, config: OptimConfig, main: Tensor) -> None:
        self._main, self._momentum = main, config.sgd_momentum
        self.state = {"momentum_buffer": torch.zeros_like(main)}

    def step(self, grad: Tensor, factor: _Factor, *, lr: float, weight_decay: float) -> None:
        sgd(
            [self._main], [grad], [self.state["momentum_buffer"]], fused=True, foreach=False, grad_scale=factor.inverse,
            momentum=self._momentum, dampening=0.0, nesterov=False, maximize=False, lr=lr, weight_decay=weight_decay,
        )  # fmt: skip

    @property
    def steps(self) -> int:
        return 0

    @steps.setter
    def steps(self, count: int) -> None: ...


class _ApexAdam:
    """apex's FusedAdam, which keeps the number of steps in its group."""

    def __init__(self, config: OptimConfig, main: Tensor) -> None:
        self._main = torch.nn.Parameter(main)
        betas = (config.adam_beta1, config.adam_beta2)
        kernel = import_module("apex.optimizers").FusedAdam
        self._optimizer: torch.optim.Optimizer = kernel(
            [self._main], lr=0.0, betas=betas, eps=config.adam_eps, adam_w_mode=True
        )
        self.state = {"exp_avg": torch.zeros_like(main), "exp_avg_sq": torch.zeros_like(main)}
        self._optimizer.state[self._main].update(self.state)

    def step(self, grad: Tensor, factor: _Factor, *, lr: float, weight_decay: float) -> None:
        if factor.inverse is not None:
            grad.mul_(factor.value)
        self._optimizer.param_groups[0].update(lr=lr, weight_decay=weight_decay)
        self._main.grad = grad
        self._optimizer.step()
        self._main.grad = None

    @property
    def steps(self) -> int:
        return int(self._optimizer.param_groups[0].get("step", 0))

    @steps.setter
    def steps(self, count: int) -> None:
        self._optimizer.param_groups[0]["step"] = count
