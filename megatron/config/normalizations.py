"""Table of the normalisation layers that a model can have, by the name of their class. Imports no torch.

Each entry names a class, which is imported when a model is built: a subclass of `torch.nn.Module` like those of
`megatron/model/norm.py`. Its constructor takes a `ModelConfig` and a `TensorParallel`. It must create parameters with
`TensorParallel.parameter`, which records the properties that the computation of sizes, gradients, optimizer and checkpoints
use.

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

BUILT_IN: Mapping[str, EntryPoint] = MappingProxyType(
    {
        "LayerNorm": EntryPoint("LayerNorm", "megatron.model.norm:LayerNorm", GROUP),
        "RMSNorm": EntryPoint("RMSNorm", "megatron.model.norm:RMSNorm", GROUP),
    }
)
NORMALIZATIONS: Mapping[str, EntryPoint] = with_installed(BUILT_IN, GROUP)


def norm_class(normalization: str) -> Callable[..., Any]:
    """Import and return the class of a normalisation.

    Raises:
        ValueError: the normalisation is unknown; or its entry point cannot be loaded or is not a class, and the text continues
            a message that begins with the flag.
    """
    if normalization not in NORMALIZATIONS:
        raise ValueError(f"unknown normalization {normalization}; known are {', '.join(NORMALIZATIONS)}")
    entry = NORMALIZATIONS[normalization]
    loaded = load_entry(entry)
    if not isinstance(loaded, type):
        raise ValueError(f"needs {entry.value}, which is not a class")
    return loaded
