"""Checks that tensors of strangers can be the weights of a trained model at all."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from megatron.checkpoint.layout import CheckpointError

WEIGHT_DTYPES = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})


def refuse_unsound(weights: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError naming a tensor that is no weight: of integers or 8 bits, or with values that are not finite."""
    for name, tensor in weights.items():
        if tensor.dtype not in WEIGHT_DTYPES:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise CheckpointError(
                f"{name} holds {kind}, which is no weight as it is; if the model is quantized, take the original"
            )
        if not tensor.isfinite().all():
            raise CheckpointError(f"{name} has values that are not finite (NaN or infinity); the model is damaged")


def zero_matrices(weights: Mapping[str, Tensor]) -> list[str]:
    """Return the names of matrices in which nothing but zeros is; biases may be so."""
    return [name for name, tensor in weights.items() if tensor.dim() > 1 and not tensor.any()]
