"""Random numbers that no layout shows in.

*Weights*: every parameter is drawn whole, on the CPU, from a generator seeded with (seed, its global name); a rank then
keeps its rectangle.

*Dropout*: a mask bit is a hash of (seed, sample number, position in the sample, layer, site, feature). No generator has
a state, so any rank can compute any piece of any mask: a sequence-parallel slice, one head's attention weights, or the
same mask again in a recomputed forward. Sample numbers count over the whole run, so a resumed run draws what the
uninterrupted one draws. The hash is the 32-bit finaliser known as lowbias32, on int32 tensors that wrap around.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

_MULTIPLY_1 = 0x7FEB352D
_MULTIPLY_2 = 0x846CA68B - (1 << 32)  # as a signed 32-bit number


def derive_seed(seed: int, *path: str | int) -> int:
    """Return a 63-bit seed for the thing that `path` names; independent of those of other paths."""
    digest = hashlib.blake2b(repr((seed, *path)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _key(seed: int, *path: str | int) -> int:
    """Return a signed 32-bit key."""
    return (derive_seed(seed, *path) & 0xFFFFFFFF) - (1 << 31)


def _mix(x: Tensor) -> Tensor:
    """Scramble int32; overwrites `x`, which must be fresh."""
    x ^= (x >> 16) & 0xFFFF
    x *= _MULTIPLY_1
    x ^= (x >> 15) & 0x1FFFF
    x *= _MULTIPLY_2
    x ^= (x >> 16) & 0xFFFF
    return x


def _low32(x: Tensor) -> Tensor:
    """Return the low 32 bits of int64, as int32."""
    x = x & 0xFFFFFFFF
    return (x - ((x >> 31) << 32)).to(torch.int32)


def site_key(seed: int, layer: int, site: str) -> Tensor:
    """Return the key of one place of dropout in the residual stream, int32 scalar.

    A module holds it as a buffer, so that the layers of a model differ in data and not in code, and are compiled once.

    Args:
        seed: of the run.
        layer: global number, -1 outside the layers.
        site: name of the place within the layer.
    """
    return torch.tensor(_key(seed, "site", layer, site), dtype=torch.int32)


def head_keys(seed: int, layer: int, heads: range) -> Tensor:
    """Return the keys of a layer's attention heads, int32 `[heads]`.

    Args:
        seed: of the run.
        layer: global number.
        heads: global numbers of the heads.
    """
    return torch.tensor([_key(seed, "head", layer, head) for head in heads], dtype=torch.int32)


@dataclass(frozen=True)
class DropoutKeys:
    """The random identity of each token of a micro-batch, from which with a place's key every mask follows.

    Attributes:
        whole: int32 `[seq, batch]`, for all tokens at hand.
        local: the slice this rank holds between the parallel layers, `whole` itself without sequence parallelism.
        feature: key of the masks of the residual stream.
        weight: key of the masks of attention weights.
    """

    whole: Tensor
    local: Tensor
    feature: int
    weight: int

    @classmethod
    def from_samples(cls, seed: int, samples: Tensor, columns: Tensor, local: slice) -> DropoutKeys:
        """Hash the identity of each token.

        Args:
            seed: of the run.
            samples: int64 `[batch]`, sample numbers.
            columns: int64 `[seq]`, positions within the sample.
            local: the slice of seq that this rank holds between the parallel layers.
        """
        low = _mix(_low32(samples) ^ _key(seed, "sample"))
        sample = _mix(low + _low32(samples >> 32))  # [batch]; all 64 bits of the number have their say
        column = _mix(_low32(columns) ^ _key(seed, "column"))  # [seq]
        whole = _mix(sample.unsqueeze(0) + column.unsqueeze(1))  # [seq, batch]
        return cls(whole, whole[local], _key(seed, "feature"), _key(seed, "weight"))

    def features(self, site: Tensor, width: int) -> Tensor:
        """Return uniform int32 `[local seq, batch, width]`: one number for each feature of each local token.

        site: of `site_key`.
        """
        return _mix(_mix(self.local ^ site).unsqueeze(-1) + self._lane(self.feature, width))

    def attention(self, heads: Tensor, queries: slice = slice(None), keys: range | None = None) -> Tensor:
        """Return uniform int32 `[batch, heads, queries, keys]`: one number for each attention weight.

        Args:
            heads: int32 `[heads]`, of `head_keys`.
            queries: which of the tokens of `whole`.
            keys: positions in the sample, those of `whole` unless given.
        """
        rows = self.whole[queries].t().contiguous().unsqueeze(1)  # so that the numbers lie as weights do
        rows = _mix(rows ^ heads.view(1, -1, 1))  # [batch, heads, queries]
        keys = range(self.whole.shape[0]) if keys is None else keys
        return _mix(rows.unsqueeze(-1) + self._lane(self.weight, len(keys), keys.start))

    def _lane(self, key: int, width: int, first: int = 0) -> Tensor:
        return _mix(torch.arange(first, first + width, dtype=torch.int32, device=self.whole.device) ^ key)


def drop(x: Tensor, numbers: Tensor, probability: float) -> Tensor:
    """Return x, zero where its number falls below `probability`, else scaled by 1 / (1 - probability).

    Only a byte an element is kept for the backward.

    Args:
        x: `[...]`.
        numbers: int32 of x's shape, uniform.
        probability: of an element to be dropped.
    """
    threshold = round(probability * (1 << 32)) - (1 << 31)  # int32 begins at -2^31
    return torch.where(numbers >= threshold, x * (1.0 / (1.0 - probability)), 0.0)
