"""Initialise the weights of a model by a table of rules, with values that do not depend on the parallel layout.

The default rules are those of Megatron-LM and GPT-2: N(0, std) for matrices, but N(0, std / sqrt(2 L)) for the two projections
of each layer that write to the residual stream, where L is the number of layers of the whole model; zeros for biases, ones for
norms.
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
    """Return the initialisation rules: for each value of `ParameterSpec.init`, a function that fills an fp32 tensor."""
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
def fill_parameters(targets: Iterable[tuple[ParameterSpec, Tensor]], config: ModelConfig, seed: int) -> None:
    """Write initial weights into local tensors.

    Every rank draws the whole parameter on the CPU in fp32, from a generator seeded with `seed` and the parameter's global
    name, and copies its part. The weights are therefore the same on every device and in every layout. Padding is zero.

    Args:
        targets: specs of parameters, each with the local tensor to fill.
        config: the model, for the standard deviation and the number of layers.
        seed: the run's seed.
    """
    table = rules(config)
    for spec, target in targets:
        whole = torch.empty(spec.shape)  # fp32, on the CPU
        table[spec.init](whole, torch.Generator().manual_seed(derive_seed(seed, "weights", spec.name)))
        target.zero_()  # padding stays zero
        spec.local(target).copy_(whole[spec.part.slices])


def initialize(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Write initial weights into a model's own parameters, rounded to their dtype.

    Args:
        model: the model; each of its parameters must have a named spec.
        config: the model, for the standard deviation and the number of layers.
        seed: the run's seed.
    """
    fill_parameters(((param_spec(p), p) for p in model.parameters()), config, seed)
