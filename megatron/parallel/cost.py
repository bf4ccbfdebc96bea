"""Costs of modules as they report them: FLOPs, and bytes of activations.

A module's method `flops(seq)` returns its FLOPs for one token of a sequence of `seq` tokens, and its `activation_bytes(shape)`
the bytes that it saves for the backward pass. Neither includes the module's submodules, which report for themselves. A module
without such a method has a negligible cost.
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
    """FLOPs of one token's forward pass, summed over all ranks: 2 for each multiply-add of a matrix product, nothing else.

    Attributes:
        linear: FLOPs of products with a weight.
        core: FLOPs of products of two activations, as in attention.
    """

    linear: int = 0
    core: int = 0

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.linear + other.linear, self.core + other.core)

    @property
    def total(self) -> int:
        """The sum of both kinds."""
        return self.linear + self.core


def weight_flops(weight: Tensor) -> Flops:
    """Return the FLOPs of one token's product with a whole weight, of which `weight` may be this rank's part."""
    return Flops(linear=2 * prod(param_spec(weight).shape))


def module_flops(module: nn.Module, seq: int) -> Flops:
    """Return the FLOPs of a module and its submodules for one token of a sequence of `seq` tokens."""
    modules: Iterable[Any] = module.modules()
    return sum((part.flops(seq) for part in modules if hasattr(part, "flops")), Flops())


@dataclass(frozen=True)
class MicroBatchShape:
    """Shape of a micro-batch in the layers of one rank. "Regions" are those of `TensorParallel`.

    Attributes:
        rows: number of samples.
        seq: tokens of a sample; under context parallelism, those on this rank.
        hidden: width of the residual stream.
        element: bytes of an element in the compute dtype.
        shared: number of ranks that divide the tokens between the regions; 1 without sequence parallelism.
    """

    rows: int
    seq: int
    hidden: int
    element: int
    shared: int = 1

    @property
    def tokens(self) -> int:
        """Number of tokens within the regions."""
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
        saved: bytes saved by the forward pass for the backward pass.
        core: the part of `saved` that the core attention saves.
        transient: additional peak bytes while the module runs.
        weight_grad: bytes of the factors of weight gradients, which a split backward pass stores from I to W.
    """

    saved: int = 0
    core: int = 0
    transient: int = 0
    weight_grad: int = 0

    def __add__(self, other: ActivationBytes) -> ActivationBytes:
        """Return the bytes of two modules that run one after the other."""
        return ActivationBytes(
            self.saved + other.saved,
            self.core + other.core,
            max(self.transient, other.transient),
            self.weight_grad + other.weight_grad,
        )


def module_activation_bytes(module: nn.Module, shape: MicroBatchShape) -> ActivationBytes:
    """Return the activation bytes of a module and its submodules without recomputation (arXiv 2205.05198, section 4).

    In 16 bit, with a heads of width d, a d = h, an MLP of width 4 h and saved attention weights, a layer has
    s b h (10 + 24/t + 5 a s / (h t)) bytes; with sequence parallelism all of it is divided by t (equations 2 and 4 there). The
    term in a s is absent with a fused attention kernel. A few numbers per token or head are not counted, nor are the
    intermediate tensors of an unfused RMSNorm.
    """
    modules: Iterable[Any] = module.modules()
    return sum((part.activation_bytes(shape) for part in modules if hasattr(part, "activation_bytes")), ActivationBytes())
