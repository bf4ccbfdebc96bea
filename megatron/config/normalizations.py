"""Table of the normalisation layers that a model can have, by the name of their class. Imports no torch.

The class is a `torch.nn.Module` made from a `ModelConfig` and a `TensorParallel`, as those of `megatron/model/norm.py` are; it
is imported when a model is built. It makes its parameters with `TensorParallel.parameter`, which records what sizes, gradients,
optimizer and checkpoints need to know of them.

A package outside this one adds a normalisation by an entry point of the group `megatron.normalizations`, in its pyproject.toml:

    [project.entry-points."megatron.normalizations"]
    DynamicTanh = "my_package.norms:DynamicTanh"

The package is imported only when the normalisation is used, and cannot take the name of a built-in one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.metadata import EntryPoint
from types import MappingProxyType
from typing import Any

from megatron.config.entry_points import load_entry, with_installed

GROUP = "megatron.normalizations"

OWN: Mapping[str, EntryPoint] = MappingProxyType(
    {
        "LayerNorm": EntryPoint("LayerNorm", "megatron.model.norm:LayerNorm", GROUP),
        "RMSNorm": EntryPoint("RMSNorm", "megatron.model.norm:RMSNorm", GROUP),
    }
)
NORMALIZATIONS: Mapping[str, EntryPoint] = with_installed(OWN, GROUP)


def norm_class(normalization: str) -> Callable[..., Any]:
    """Return the class of a normalisation. ValueError when it is unknown, or its package does not hold such a class."""
    if normalization not in NORMALIZATIONS:
        raise ValueError(f"unknown normalization {normalization}; known are {', '.join(NORMALIZATIONS)}")
    found = NORMALIZATIONS[normalization]
    made = load_entry(found)
    if not isinstance(made, type):
        raise ValueError(f"needs {found.value}, which is no class")
    return made
