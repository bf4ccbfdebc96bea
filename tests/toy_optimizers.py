"""An optimizer for matrices that the package does not have, as another package would bring it.

Momentum, made orthogonal by Newton and Schulz's iteration, for weights of layers; AdamW for all the rest.
"""

from __future__ import annotations

from torch import Tensor

from megatron.config.optimizers import ADAMW, UpdateRule
from megatron.config.schema import OptimConfig
from megatron.optim.update import Factor, Method, Target

MOMENTUM = 0.9


def is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    return name.startswith("layers.") and len(shape) == 2


RULES = (UpdateRule("toy_optimizers:orthogonal_method", moments=1, applies=is_matrix, whole=True), ADAMW)


def orthogonal(matrix: Tensor, steps: int = 6) -> Tensor:
    """Move the singular values of a matrix `[m, n]` towards 1."""
    x = matrix / (matrix.norm() + 1e-7)
    for _ in range(steps):
        x = 1.5 * x - 0.5 * (x @ x.t() @ x)
    return x


class Orthogonal:
    """Momentum, made orthogonal, for each matrix in a target, which is put together from the ranks that it is split over."""

    def __init__(self, target: Target) -> None:
        self.target, self.steps = target, 0
        self.state = {"momentum": target.main.new_zeros(target.main.shape)}

    def step(self, grad: Tensor, factor: Factor, *, lr: float, weight_decay: float) -> None:
        self.steps += 1
        momentum, main = self.state["momentum"], self.target.main
        momentum.mul_(MOMENTUM).add_(grad, alpha=factor.value)
        main.mul_(1.0 - lr * weight_decay)
        pairs = zip(self.target.whole_params(momentum), self.target.whole_params(main), strict=True)
        for (spec, part), (_, weight) in pairs:
            weight.sub_(orthogonal(self.target.join(spec, part))[spec.part.slices], alpha=lr)


def orthogonal_method(config: OptimConfig, target: Target) -> Method:
    return Orthogonal(target)
