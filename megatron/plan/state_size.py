"""Bytes of weights, gradients and optimizer state on one rank: exact for `optim/buffers.py`. Pure arithmetic.

With d ranks that own a slice each, a parameter takes 6 + 12 / d bytes where the model computes in 16 bit, 8 + 8 / d in fp32:
weights and fp32 gradients whole; of the slice fp32 main weights (the weights themselves in an fp32 run) and two fp32 moments.
With bf16 gradients it takes 4 + 12 / d. Then the update makes an fp32 copy of the slice's gradients, one bucket after the
other, when activations are gone already: it is not counted.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from megatron.parallel.buckets import buckets


@dataclass(frozen=True)
class StateBytes:
    """weights: as the model computes with them, and the main weights beside them. optimizer: the moments."""

    weights: int
    gradients: int
    optimizer: int


def state_bytes(
    sizes: Sequence[int],
    kinds: Sequence[Hashable],
    *,
    two_bytes: bool,
    optimizer: str = "adam",
    bucket: int | None = None,
    shards: int = 1,
    bf16_gradients: bool = False,
) -> StateBytes:
    """sizes, kinds: of a rank's parameters, as for `parallel.buckets.buckets`. two_bytes: the model computes in 16 bit.

    optimizer: adam has two moments, sgd one. bucket: --ddp-bucket-size. shards: ranks that own a slice each.
    bf16_gradients: they are accumulated and reduced in bf16.
    """
    held = sum(b.length for b in buckets(sizes, kinds, bucket, shards))
    own = held // shards
    return StateBytes(
        weights=2 * held + 4 * own if two_bytes else 4 * held,
        gradients=(2 if bf16_gradients else 4) * held,
        optimizer=own * (8 if optimizer == "adam" else 4),
    )
