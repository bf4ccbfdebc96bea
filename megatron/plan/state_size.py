"""Bytes of weights, gradients and optimizer state on one rank: exact for `optim/buffers.py`. Pure arithmetic.

ZeRO-1 (arXiv 1910.02054, figure 1, P_os): with d ranks that own a slice each, a parameter takes 6 + 12 / d bytes where the
model computes in 16 bit, 8 + 8 / d in fp32: weights and fp32 gradients whole; of the slice fp32 main weights (the weights
themselves in an fp32 run) and AdamW's two fp32 moments. Another rule of `config/optimizers.py` keeps as many as it says.
With bf16 gradients it takes 4 + 12 / d. Then the update makes an fp32 copy of the slice's gradients, one bucket after the
other, when activations are gone already: it is not counted.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from megatron.config.optimizers import ADAMW, UpdateRule
from megatron.parallel.buckets import buckets


@dataclass(frozen=True)
class StateBytes:
    """weights: as the model computes with them, and the main weights beside them. optimizer: the moments."""

    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """All bytes of the state."""
        return self.weights + self.gradients + self.optimizer


def state_bytes(
    sizes: Sequence[int],
    kinds: Sequence[Hashable],
    *,
    is_16bit: bool,
    rules: Sequence[UpdateRule] | None = None,
    bucket: int | None = None,
    shards: int = 1,
    bf16_gradients: bool = False,
) -> StateBytes:
    """Return the bytes that one rank keeps for its parameters.

    Args:
        sizes: elements of each parameter, as for `parallel.buckets.buckets`.
        kinds: of each parameter, beside its rule.
        is_16bit: whether the model computes in 16 bit.
        rules: how each parameter is updated; None: all by AdamW.
        bucket: --ddp-bucket-size.
        shards: ranks that own a slice each.
        bf16_gradients: whether gradients are accumulated and reduced in bf16.
    """
    rules = [ADAMW] * len(sizes) if rules is None else rules
    full_kinds = list(zip(kinds, rules, strict=True))
    whole = {(kind, rule) for kind, rule in full_kinds if rule.whole}
    found = buckets(sizes, full_kinds, bucket, shards, whole)
    held = sum(b.length for b in found)
    own = held // shards
    return StateBytes(
        weights=2 * held + 4 * own if is_16bit else 4 * held,
        gradients=(2 if bf16_gradients else 4) * held,
        optimizer=sum(4 * rules[b.members[0]].moments * (b.length // shards) for b in found),
    )
