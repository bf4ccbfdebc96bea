"""The parameters of modules as one part of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from megatron.parallel.spec import Shard, param_spec


class ModuleWeights:
    """Checkpoint part with the parameters of one or more modules, such as a rank's pipeline stages, and no optimizer state."""

    def __init__(self, *modules: nn.Module) -> None:
        self.parameters = [p for module in modules for p in module.parameters()]

    def shards(self) -> Iterator[Shard]:
        for parameter in self.parameters:
            spec = param_spec(parameter)
            # `spec.local` is a view without the padding rows of a vocabulary, so that loading fills the parameter in place.
            yield Shard(spec.name, spec.shape, spec.part, spec.split_over, spec.local(parameter.detach()))

    def scalars(self) -> dict[str, Any]:
        return {}

    def load_scalars(self, values: Mapping[str, Any]) -> None:
        """Zero the padding rows of the parameters: there are no scalars to load, and checkpoints do not contain padding.

        The loader calls this after it has filled the shards.
        """
        with torch.no_grad():
            for parameter in self.parameters:
                spec = param_spec(parameter)
                if parameter.dim() and parameter.shape[0] > spec.part.shape[0]:
                    parameter[spec.part.shape[0] :] = 0
