"""Bytes of weights, gradients and optimizer state on one rank: exactly what `optim/buffers.py` allocates.

The optimizer state is sharded over d ranks by ZeRO-1 (arXiv 1910.02054, figure 1, P_os). Each rank holds all weights and
gradients, and for its slice the fp32 main weights (in an fp32 run these are the weights themselves) and AdamW's two fp32
moments; other rules of `config/optimizers.py` have their own number of moments. Bytes per parameter with AdamW:

    16-bit weights, fp32 gradients      6 + 12 / d
    16-bit weights, bf16 gradients      4 + 12 / d
    fp32 weights and gradients          8 + 8 / d

With bf16 gradients the update makes an fp32 copy of its slice's gradients, one bucket at a time. This copy is not counted,
because activations have been freed by then.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from megatron.config.optimizers import ADAMW, UpdateRule
from megatron.parallel.buckets import buckets


@dataclass(frozen=True)
class StateBytes:
    """Bytes on one rank.

    Attributes:
        weights: the weights that the model computes with, and the fp32 main weights of a 16-bit run.
        gradients: the accumulated gradients.
        optimizer: the optimizer's moments.
    """

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
    """Return the bytes that one rank stores for its parameters.

    Args:
        sizes: elements of each parameter on this rank, in the order of `parallel.buckets.buckets`.
        kinds: the `bucket_kind` of each parameter; only parameters of the same kind and rule share a bucket.
        is_16bit: whether the model computes in 16 bit.
        rules: the update rule of each parameter; None for AdamW throughout.
        bucket: the size of a bucket in elements, as --ddp-bucket-size; None for no limit.
        shards: ranks that main weights and optimizer state are sharded over.
        bf16_gradients: whether gradients are accumulated and reduced in bf16.
    """
    rules = [ADAMW] * len(sizes) if rules is None else rules
    kinds_with_rules = list(zip(kinds, rules, strict=True))
    unsplit = {(kind, rule) for kind, rule in kinds_with_rules if rule.whole}
    laid_out = buckets(sizes, kinds_with_rules, bucket, shards, unsplit)
    elements = sum(b.length for b in laid_out)
    shard_elements = elements // shards
    return StateBytes(
        weights=2 * elements + 4 * shard_elements if is_16bit else 4 * elements,
        gradients=(2 if bf16_gradients else 4) * elements,
        optimizer=sum(4 * rules[b.members[0]].moments * (b.length // shards) for b in laid_out),
    )
