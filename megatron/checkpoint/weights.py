"""The parameters of modules as one part of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from megatron.parallel.spec import Shard, param_spec


class ModuleWeights:
    """Part of a checkpoint that holds the parameters of one or several modules: a rank's stages, without an optimizer."""

    def __init__(self, *modules: nn.Module) -> None:
        self.parameters = [p for module in modules for p in module.parameters()]

    def shards(self) -> Iterator[Shard]:
        for parameter in self.parameters:
            spec = param_spec(parameter)
            # The part alone, without the rows that pad a vocabulary, shares the parameter's memory: loading fills it in place.
            yield Shard(spec.name, spec.shape, spec.part, spec.split_over, spec.local(parameter.detach()))

    def scalars(self) -> dict[str, Any]:
        return {}

    def load_scalars(self, values: Mapping[str, Any]) -> None:
        """Zero the parameters' padding, which no checkpoint holds. Called when the shards are filled."""
        with torch.no_grad():
            for parameter in self.parameters:
                spec = param_spec(parameter)
                if parameter.dim() and parameter.shape[0] > spec.part.shape[0]:
                    parameter[spec.part.shape[0] :] = 0
