"""Checks that tensors of untrusted files can be the weights of a trained model."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from megatron.checkpoint.layout import CheckpointError

WEIGHT_DTYPES = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})


def refuse_unsound(weights: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError for a tensor of another dtype than WEIGHT_DTYPES, or with NaN or infinity in it."""
    for name, tensor in weights.items():
        if tensor.dtype not in WEIGHT_DTYPES:
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise CheckpointError(
                f"{name} holds {dtype}, which is not a dtype of trained weights; if the model is quantized, use the original"
            )
        if not tensor.isfinite().all():
            raise CheckpointError(f"{name} has values that are not finite (NaN or infinity); the model is damaged")


def zero_matrices(weights: Mapping[str, Tensor]) -> list[str]:
    """Return the names of matrices that are all zeros. Vectors are not checked, since biases may be zeros."""
    return [name for name, tensor in weights.items() if tensor.dim() > 1 and not tensor.any()]
