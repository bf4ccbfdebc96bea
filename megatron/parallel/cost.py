"""Costs of modules, FLOPs and bytes of activations, as each module says of itself.

A module says by `flops(seq)` what it computes for one token of a sequence of `seq`, and by `activation_bytes(shape)` what it
keeps for the backward pass; both without the modules that it holds, which say it themselves. One without such a method computes
or keeps nothing that counts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor, nn

from megatron.parallel.spec import param_spec


@dataclass(frozen=True)
class Flops:
    """FLOPs of one token's forward pass, over all ranks; matrix products alone, a multiplication and an addition being 2.

    Attributes:
        linear: of products with a weight.
        core: of products of two activations, as in attention.
    """

    linear: int = 0
    core: int = 0

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.linear + other.linear, self.core + other.core)

    @property
    def total(self) -> int:
        """The sum of all kinds."""
        return self.linear + self.core


def weight_flops(weight: Tensor) -> Flops:
    """Return the FLOPs of a token's product with a matrix, of which this rank may hold a part."""
    return Flops(linear=2 * prod(param_spec(weight).shape))


def module_flops(module: nn.Module, seq: int) -> Flops:
    """Return what a module and all in it compute for one token of a sequence of `seq`."""
    every: Iterable[Any] = module.modules()
    return sum((part.flops(seq) for part in every if hasattr(part, "flops")), Flops())


@dataclass(frozen=True)
class MicroBatchShape:
    """A micro-batch as it passes through the layers of one rank.

    Attributes:
        rows: its samples.
        seq: tokens of each; under context parallelism those of this rank.
        hidden: width of the residual stream.
        element: bytes of a number that is computed with.
        shared: ranks that share the tokens between the regions of tensor parallelism, more than 1 under sequence parallelism.
    """

    rows: int
    seq: int
    hidden: int
    element: int
    shared: int = 1

    @property
    def tokens(self) -> int:
        """Tokens within the regions."""
        return self.rows * self.seq

    @property
    def hidden_elements(self) -> int:
        """Elements of the hidden states between the regions."""
        return self.tokens * self.hidden // self.shared

    @property
    def hidden_bytes(self) -> int:
        """Bytes of the hidden states between the regions."""
        return self.element * self.hidden_elements


@dataclass(frozen=True)
class ActivationBytes:
    """Bytes of activations of a micro-batch on one rank.

    Attributes:
        saved: from the forward pass to the backward pass.
        core: of these, within the core attention.
        transient: while the module is at work, at most, beside what is saved.
        weight_grad: the factors of weight gradients, of which a split backward pass keeps both until it makes them.
    """

    saved: int = 0
    core: int = 0
    transient: int = 0
    weight_grad: int = 0

    def __add__(self, other: ActivationBytes) -> ActivationBytes:
        """Return the bytes of two modules, one at work after the other."""
        return ActivationBytes(
            self.saved + other.saved,
            self.core + other.core,
            max(self.transient, other.transient),
            self.weight_grad + other.weight_grad,
        )


def module_activation_bytes(module: nn.Module, shape: MicroBatchShape) -> ActivationBytes:
    """Return what a module and all in it keep, by the count of arXiv 2205.05198, section 4, where nothing is run again.

    For 16 bit, heads of width d, a d = h, f = 4 h and attention weights kept, a layer has s b h (10 + 24/t + 5 a s / (h t))
    bytes, all of it over t under sequence parallelism: equations 2 and 4 there. The a s term falls away where a fused kernel
    does the attention. Left out: a few numbers for each token or head, and RMSNorm without a kernel.
    """
    every: Iterable[Any] = module.modules()
    return sum((part.activation_bytes(shape) for part in every if hasattr(part, "activation_bytes")), ActivationBytes())
