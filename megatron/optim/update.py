"""The update kernels: torch's fused or foreach AdamW, apex's FusedAdam and torch's SGD, with state that a checkpoint can fill.

Only this file knows how they differ: which of them scale the gradient themselves, where they store the step count, and how they
name their moments. torch's are called as functions, because importing its optimizer classes takes seconds in every process.
The rules in `config/optimizers.py` select the method that updates a target; other packages can add rules with their methods.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Protocol

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from megatron.config.optimizers import ADAMW
from megatron.config.schema import OptimConfig
from megatron.mesh.mesh import Axis
from megatron.parallel.collectives import all_reduce
from megatron.parallel.spec import ParameterSpec


def no_params(own: Tensor) -> Iterator[tuple[ParameterSpec, Tensor]]:
    """Yield nothing: for a target whose parameters are not known."""
    return iter(())


@dataclass(frozen=True)
class Target:
    """A flat fp32 tensor to update: the main weights of several parameters, or this rank's slice of them, `[own]`.

    decay: weight decay applies to it. decoupled: it uses the learning rate of the embedding and output layer, if that is
    separate. method: `module:function` that creates its `Method`. whole_params: function that yields the parameters in a tensor
    `[own]`, as views in the shapes of their parts. axis: function that returns the axis of a given name.
    """

    main: Tensor
    decay: bool
    decoupled: bool = False
    method: str = ADAMW.method
    whole_params: Callable[[Tensor], Iterator[tuple[ParameterSpec, Tensor]]] = no_params
    axis: Callable[[str], Axis] = Axis.alone

    def join(self, spec: ParameterSpec, part: Tensor) -> Tensor:
        """Return the whole tensor of `spec.shape` from every rank's part. Collective over the axes that split it."""
        whole = part.new_zeros(spec.shape)  # zero in the parts of other ranks, so that the sum over ranks joins the parts
        whole[spec.part.slices] = part
        for name in sorted(spec.split_over):
            whole = all_reduce(whole, self.axis(name))
        return whole


@dataclass(frozen=True)
class Factor:
    """Factor of a step's gradients. inverse: 1 / value on the device, for torch's fused kernels; None if value is 1."""

    value: float = 1.0
    inverse: Tensor | None = None


class Method(Protocol):
    """Optimizer of a single target.

    state: moments by name, fp32 `[own]`, allocated on construction; loading a checkpoint fills them in place. steps: number of
    updates so far, always 0 if the method does not count them.
    """

    state: dict[str, Tensor]

    @property
    def steps(self) -> int: ...

    @steps.setter
    def steps(self, count: int) -> None: ...

    def step(self, grad: Tensor, factor: Factor, *, lr: float, weight_decay: float) -> None:
        """Update the target.

        Args:
            grad: gradient of the target, fp32 `[own]`.
            factor: factor of `grad`; the method multiplies in place or in its kernel.
            lr: learning rate.
            weight_decay: weight decay; 0 if it does not apply to the target.
        """
        ...


class ShardedUpdate:
    """One optimizer for each target: this rank's slices of the buckets.

    The targets are updated one at a time, so that temporary tensors are needed for one of them only.
    ImportError when apex is configured but not installed.
    """

    def __init__(self, config: OptimConfig, targets: Iterable[Target]) -> None:
        self._targets = list(targets)
        self._methods = [make_method(config, target) for target in self._targets]
        self._factor, self._rates, self._weight_decay = Factor(), (0.0, 0.0), 0.0

    def begin(self, rates: tuple[float, float], *, weight_decay: float, multiplier: float) -> None:
        """Set the parameters of this step's updates.

        Args:
            rates: learning rate of ordinary targets and of decoupled targets.
            weight_decay: weight decay of the targets to which it applies.
            multiplier: factor of all gradients.
        """
        self._rates, self._weight_decay, self._factor = rates, weight_decay, Factor()
        if multiplier != 1.0:
            device = self._targets[0].main.device
            self._factor = Factor(multiplier, torch.tensor(1.0 / multiplier, dtype=torch.float32, device=device))

    @torch.no_grad()
    def step(self, number: int, grad: Tensor) -> None:
        """Update target `number`. grad: its gradient, fp32 `[own]`, which may be scaled in place."""
        target = self._targets[number]
        weight_decay = self._weight_decay if target.decay else 0.0
        self._methods[number].step(grad, self._factor, lr=self._rates[target.decoupled], weight_decay=weight_decay)

    def state(self, number: int) -> dict[str, Tensor]:
        """Return the moments of target `number` by name, `[own]`: the live tensors, not copies."""
        return self._methods[number].state

    @property
    def steps(self) -> int:
        """Number of updates so far; 0 if no method counts them."""
        return max(method.steps for method in self._methods)

    @steps.setter
    def steps(self, count: int) -> None:
        for method in self._methods:
            method.steps = count


def make_method(config: OptimConfig, target: Target) -> Method:
    """Import the function named by the target's `method` and call it to create the target's `Method`."""
    module, _, function = target.method.partition(":")
    method: Method = getattr(import_module(module), function)(config, target)
    return method


def adamw_method(config: OptimConfig, target: Target) -> Method:
    """Create AdamW with the configured kernel."""
    return _ApexAdam(config, target.main) if config.adam_kernel == "apex" else _AdamW(config, target.main)


def sgd_method(config: OptimConfig, target: Target) -> Method:
    """Create SGD with momentum."""
    return _SGD(config, target.main)


class _AdamW:
    """torch's AdamW, fused or foreach."""

    def __init__(self, config: OptimConfig, main: Tensor) -> None:
        self._main, self._fused = main, config.adam_kernel == "fused"
        self._config = config
        self.state = {"exp_avg": torch.zeros_like(main), "exp_avg_sq": torch.zeros_like(main)}
        self._count = torch.zeros((), device=main.device)  # the fused kernel reads it on the device

    def step(self, grad: Tensor, factor: Factor, *, lr: float, weight_decay: float) -> None:
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

    def step(self, grad: Tensor, factor: Factor, *, lr: float, weight_decay: float) -> None:
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
    """apex's FusedAdam, which stores the step count in its parameter group."""

    def __init__(self, config: OptimConfig, main: Tensor) -> None:
        self._main = torch.nn.Parameter(main)
        betas = (config.adam_beta1, config.adam_beta2)
        kernel = import_module("apex.optimizers").FusedAdam
        self._optimizer: torch.optim.Optimizer = kernel(
            [self._main], lr=0.0, betas=betas, eps=config.adam_eps, adam_w_mode=True
        )
        self.state = {"exp_avg": torch.zeros_like(main), "exp_avg_sq": torch.zeros_like(main)}
        self._optimizer.state[self._main].update(self.state)

    def step(self, grad: Tensor, factor: Factor, *, lr: float, weight_decay: float) -> None:
        if factor.inverse is not None:
            grad.mul_(factor.value)
        self._optimizer.param_groups[0].update(lr=lr, weight_decay=weight_decay)
        self._main.grad = grad
        self._optimizer.step()
        self._main.grad = None  # drops the reference to the gradient buffer

    @property
    def steps(self) -> int:
        return int(self._optimizer.param_groups[0].get("step", 0))

    @steps.setter
    def steps(self, count: int) -> None:
        self._optimizer.param_groups[0]["step"] = count
