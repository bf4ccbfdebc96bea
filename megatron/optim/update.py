"""The arithmetic of a step: torch's fused or foreach AdamW, apex's FusedAdam, or SGD, with state that a checkpoint can fill.

What differs between them is said here and nowhere else: who divides the gradient, where the number of steps is kept, and
what a moment is called. torch's are called as functions: its optimizer classes import the compiler, seconds for each process.
Which method updates a target is a rule of `config/optimizers.py`; other packages' rules bring methods of their own.
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
    """Yield nothing: of a tensor in which no parameters are known."""
    return iter(())


@dataclass(frozen=True)
class Target:
    """A flat fp32 tensor to update: main weights of several parameters, or this rank's slice of them, `[own]`.

    decay: whether weight decay reaches it. decoupled: whether it has the rate of the embedding and output layer, where they
    have one of their own. method: `module:function` that makes what updates it. whole_params: yields the parameters in a tensor
    `[own]`, as views in the shapes of their parts. axis: the axis that a spec names.
    """

    main: Tensor
    decay: bool
    decoupled: bool = False
    method: str = ADAMW.method
    whole_params: Callable[[Tensor], Iterator[tuple[ParameterSpec, Tensor]]] = no_params
    axis: Callable[[str], Axis] = Axis.alone

    def join(self, spec: ParameterSpec, part: Tensor) -> Tensor:
        """Return the whole tensor of `spec.shape`, given each rank's part of it. Collective over the axes that split it."""
        whole = part.new_zeros(spec.shape)  # zero where other ranks hold it, so that a sum joins the parts
        whole[spec.part.slices] = part
        for name in sorted(spec.split_over):
            whole = all_reduce(whole, self.axis(name))
        return whole


@dataclass(frozen=True)
class Factor:
    """Factor of the gradients of a step: a number, and its inverse where torch's fused kernels take it."""

    value: float = 1.0
    inverse: Tensor | None = None


class Method(Protocol):
    """One optimizer of one target.

    state: its moments by name, fp32 `[own]`, there from the beginning; a checkpoint fills them in place. steps: updates so far,
    0 where the method does not count them.
    """

    state: dict[str, Tensor]

    @property
    def steps(self) -> int: ...

    @steps.setter
    def steps(self, count: int) -> None: ...

    def step(self, grad: Tensor, factor: Factor, *, lr: float, weight_decay: float) -> None:
        """Update the target.

        Args:
            grad: of the target, `[own]`, fp32.
            factor: to be multiplied with `grad`, in place or as it is read.
            lr: the learning rate.
            weight_decay: 0 where none reaches the target.
        """
        ...


class ShardedUpdate:
    """An optimizer for each of some fp32 tensors, this rank's slices of the buckets.

    One each, so that an update can follow the other, with what one of them needs made and forgotten in between.
    ImportError when apex is asked for and not installed.
    """

    def __init__(self, config: OptimConfig, targets: Iterable[Target]) -> None:
        self._targets = list(targets)
        self._methods = [make_method(config, target) for target in self._targets]
        self._factor, self._rates, self._weight_decay = Factor(), (0.0, 0.0), 0.0

    def begin(self, rates: tuple[float, float], *, weight_decay: float, multiplier: float) -> None:
        """Say what the updates of this step have.

        Args:
            rates: the learning rate, and that of decoupled targets.
            weight_decay: of the targets that decay.
            multiplier: of all gradients.
        """
        self._rates, self._weight_decay, self._factor = rates, weight_decay, Factor()
        if multiplier != 1.0:
            device = self._targets[0].main.device
            self._factor = Factor(multiplier, torch.tensor(1.0 / multiplier, dtype=torch.float32, device=device))

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
        """Updates made so far; 0 where no method counts them."""
        return max(method.steps for method in self._methods)

    @steps.setter
    def steps(self, count: int) -> None:
        for method in self._methods:
            method.steps = count


def make_method(config: OptimConfig, target: Target) -> Method:
    """Make what updates a target: import the function that its rule names, and call it."""
    module, _, function = target.method.partition(":")
    method: Method = getattr(import_module(module), function)(config, target)
    return method


def adamw_method(config: OptimConfig, target: Target) -> Method:
    """Make the AdamW of the kernel that is asked for."""
    return _ApexAdam(config, target.main) if config.adam_kernel == "apex" else _AdamW(config, target.main)


def sgd_method(config: OptimConfig, target: Target) -> Method:
    """Make SGD with momentum."""
    return _SGD(config, target.main)


class _AdamW:
    """torch's, fused or foreach."""

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

    def step(self, grad: Tensor, factor: Factor, *, lr: float, weight_decay: float) -> None:
        if factor.inverse is not None:
            grad.mul_(factor.value)
        self._optimizer.param_groups[0].update(lr=lr, weight_decay=weight_decay)
        self._main.grad = grad
        self._optimizer.step()
        self._main.grad = None  # its memory is the buffer's, not the optimizer's

    @property
    def steps(self) -> int:
        return int(self._optimizer.param_groups[0].get("step", 0))

    @steps.setter
    def steps(self, count: int) -> None:
        self._optimizer.param_groups[0]["step"] = count
