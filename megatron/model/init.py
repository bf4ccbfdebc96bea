"""Initialise the weights of a model: a table of rules, and draws that do not depend on the layout.

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
from megatron.parallel.spec import ParameterSpec, param_spec

Rule = Callable[[Tensor, torch.Generator], object]


def rules(config: ModelConfig) -> dict[str, Rule]:
    """Return the initialisation rules: for each value of `ParameterSpec.init`, a function that fills a whole fp32 tensor."""
    std, layers = config.init_method_std, config.num_layers

    def normal(scale: float) -> Rule:
        return lambda whole, generator: whole.normal_(0.0, scale, generator=generator)

    def xavier(whole: Tensor, generator: torch.Generator) -> object:
        bound = math.sqrt(6.0 / sum(whole.shape))  # Glorot and Bengio 2010, equation 16
        return whole.uniform_(-bound, bound, generator=generator)

    matrix = xavier if config.init_method_xavier_uniform else normal(std)
    return {
        "normal": matrix,
        "output": xavier if config.init_method_xavier_uniform else normal(std / math.sqrt(2.0 * layers)),
        "zeros": lambda whole, _: whole.zero_(),
        "ones": lambda whole, _: whole.fill_(1.0),
    }


@torch.no_grad()
def fill_parameters(places: Iterable[tuple[ParameterSpec, Tensor]], config: ModelConfig, seed: int) -> None:
    """Write initial weights into local tensors. Each parameter is drawn whole from (seed, its global name), then sliced.

    The draw is on the CPU in fp32, so the weights are the same on every device and layout. Padding is zero.

    Args:
        places: specs of parameters, each with the local tensor to fill.
        config: gives the standard deviation and the number of layers.
        seed: the run's seed.
    """
    table = rules(config)
    for spec, place in places:
        whole = torch.empty(spec.shape)  # fp32, on the CPU
        table[spec.init](whole, torch.Generator().manual_seed(derive_seed(seed, "weights", spec.name)))
        place.zero_()  # padding stays zero
        spec.local(place).copy_(whole[spec.part.slices])


def initialize(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Write initial weights into a model's own parameters, rounded to their dtype.

    Args:
        model: the model; each of its parameters must have a named spec.
        config: gives the standard deviation and the number of layers.
        seed: the run's seed.
    """
    fill_parameters(((param_spec(p), p) for p in model.parameters()), config, seed)
