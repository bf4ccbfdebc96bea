"""Every initialisation rule in one table, drawn so that no layout shows in the weights.

Megatron-LM's rules (as GPT-2's): N(0, std) for matrices, N(0, std / sqrt(2 L)) for the two projections of each layer
that end in the residual stream, L the layers of the whole model; zeros for biases, ones for norms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from megatron.config.schema import ModelConfig
from megatron.parallel.random import derive_seed
from megatron.parallel.spec import ParamSpec, spec_of

Rule = Callable[[Tensor, torch.Generator], object]


def rules(config: ModelConfig) -> dict[str, Rule]:
    """The table: `ParamSpec.init` -> how to fill a whole fp32 tensor."""
    std, layers = config.init_method_std, config.num_layers

    def normal(scale: float) -> Rule:
        return lambda whole, generator: whole.normal_(0.0, scale, generator=generator)

    def xavier(whole: Tensor, generator: torch.Generator) -> object:
        bound = math.sqrt(6.0 / sum(whole.shape))
        return whole.uniform_(-bound, bound, generator=generator)

    matrix = xavier if config.init_method_xavier_uniform else normal(std)
    return {
        "normal": matrix,
        "output": xavier if config.init_method_xavier_uniform else normal(std / math.sqrt(2.0 * layers)),
        "zeros": lambda whole, _: whole.zero_(),
        "ones": lambda whole, _: whole.fill_(1.0),
    }


@torch.no_grad()
def fill(places: Iterable[tuple[ParamSpec, Tensor]], config: ModelConfig, seed: int) -> None:
    """Initial weights into local tensors: each drawn whole from (seed, its global name), of which the part is kept.

    The draw is on the CPU in fp32, so the weights are the same on every device and layout. Padding is zero.
    """
    table = rules(config)
    for spec, place in places:
        whole = torch.empty(spec.shape)
        table[spec.init](whole, torch.Generator().manual_seed(derive_seed(seed, "weights", spec.name)))
        place.zero_()
        spec.local(place).copy_(whole[spec.part.slices])


def initialize(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Initial weights into a model's own parameters, rounded to their dtype."""
    fill(((spec_of(p), p) for p in model.parameters()), config, seed)
