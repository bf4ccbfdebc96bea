"""What modules cost, as each says of itself.

A module says by a method `flops` what it computes beside the modules that it holds, which say it themselves. One without the
method computes nothing that counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from megatron.parallel.spec import spec_of


@dataclass(frozen=True)
class Flops:
    """FLOPs of one token's forward pass, over all ranks; matrix products alone, a multiplication and an addition being 2.

    linear: of products with a weight. core: of products of two activations, as in attention.
    """

    linear: int = 0
    core: int = 0

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.linear + other.linear, self.core + other.core)

    @property
    def total(self) -> int:
        """The sum of all kinds."""
        return self.linear + self.core


@runtime_checkable
class Computes(Protocol):
    """A module that says what it computes."""

    def flops(self, seq: int) -> Flops:
        """Return its own FLOPs, without those of the modules in it, for one token of a sequence of `seq`."""
        ...


def product_flops(weight: Tensor) -> Flops:
    """Return the FLOPs of a token's product with a matrix, of which this rank may hold a part."""
    return Flops(linear=2 * prod(spec_of(weight).shape))


def flops_of(module: nn.Module, seq: int) -> Flops:
    """Return what a module and all in it compute for one token of a sequence of `seq`."""
    return sum((part.flops(seq) for part in module.modules() if isinstance(part, Computes)), Flops())
