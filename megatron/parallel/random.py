"""Random numbers that do not depend on the parallel layout.

*Weights*: every rank draws a whole parameter on the CPU, from a generator seeded with (seed, the parameter's global name), and
copies its rectangle.

*Dropout*: each element of a mask is a hash of (seed, sample number, position in the sample, layer, site, feature). There is no
generator state, so any rank can compute any part of any mask: a sequence-parallel slice, one head's attention weights, or the
same mask again in a recomputed forward pass. Samples are numbered over the whole run, so a resumed run draws the same masks as
an uninterrupted one. The hash is the 32-bit finaliser lowbias32, on int32 tensors whose arithmetic wraps around.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

_MULTIPLY_1 = 0x7FEB352D
_MULTIPLY_2 = 0x846CA68B - (1 << 32)  # as a signed 32-bit number


def derive_seed(seed: int, *path: str | int) -> int:
    """Return a 63-bit seed for the purpose that `path` names, independent of the seeds of other paths."""
    digest = hashlib.blake2b(repr((seed, *path)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _key(seed: int, *path: str | int) -> int:
    """Return a signed 32-bit key."""
    return (derive_seed(seed, *path) & 0xFFFFFFFF) - (1 << 31)


def _mix(x: Tensor) -> Tensor:
    """Hash int32 values in place. `x` must be a temporary tensor of the caller."""
    x ^= (x >> 16) & 0xFFFF
    x *= _MULTIPLY_1
    x ^= (x >> 15) & 0x1FFFF
    x *= _MULTIPLY_2
    x ^= (x >> 16) & 0xFFFF
    return x


def _low32(x: Tensor) -> Tensor:
    """Return the low 32 bits of int64 values, as int32."""
    x = x & 0xFFFFFFFF
    return (x - ((x >> 31) << 32)).to(torch.int32)


def site_key(seed: int, layer: int, site: str) -> Tensor:
    """Return the key of one dropout site of the residual stream, int32 scalar.

    Modules store it as a buffer, not as a Python number: layers then differ only in data, and torch.compile compiles them once.

    Args:
        seed: the run's seed.
        layer: global number of the layer; -1 outside the layers.
        site: name of the site within the layer.
    """
    return torch.tensor(_key(seed, "site", layer, site), dtype=torch.int32)


def head_keys(seed: int, layer: int, heads: range) -> Tensor:
    """Return the keys of a layer's attention heads, int32 `[heads]`.

    Args:
        seed: the run's seed.
        layer: global number of the layer.
        heads: numbers of the heads among all ranks' heads.
    """
    return torch.tensor([_key(seed, "head", layer, head) for head in heads], dtype=torch.int32)


@dataclass(frozen=True)
class DropoutKeys:
    """A random key for each token of a micro-batch. Combined with the key of a site or head, it determines the dropout masks.

    Attributes:
        whole: int32 `[seq, batch]`, keys of all tokens of this rank's sequences.
        local: keys of this rank's slice of the sequence between the parallel layers; `whole` without sequence parallelism.
        feature: key of the masks of the residual stream.
        weight: key of the masks of attention weights.
    """

    whole: Tensor
    local: Tensor
    feature: int
    weight: int

    @classmethod
    def from_samples(cls, seed: int, samples: Tensor, columns: Tensor, local: slice) -> DropoutKeys:
        """Hash the sample number and position of each token.

        Args:
            seed: the run's seed.
            samples: int64 `[batch]`, sample numbers.
            columns: int64 `[seq]`, positions within the sample.
            local: this rank's slice of the sequence between the parallel layers.
        """
        low = _mix(_low32(samples) ^ _key(seed, "sample"))
        sample = _mix(low + _low32(samples >> 32))  # [batch]; depends on all 64 bits of the number
        column = _mix(_low32(columns) ^ _key(seed, "column"))  # [seq]
        whole = _mix(sample.unsqueeze(0) + column.unsqueeze(1))  # [seq, batch]
        return cls(whole, whole[local], _key(seed, "feature"), _key(seed, "weight"))

    def features(self, site: Tensor, width: int) -> Tensor:
        """Return uniform int32 `[local seq, batch, width]`: one number for each feature of each local token.

        site: the key of the dropout site, as `site_key` returns it.
        """
        return _mix(_mix(self.local ^ site).unsqueeze(-1) + self._hash_indices(self.feature, width))

    def attention(self, heads: Tensor, queries: slice = slice(None), keys: range | None = None) -> Tensor:
        """Return uniform int32 `[batch, heads, queries, keys]`: one number for each attention weight.

        Args:
            heads: int32 `[heads]`, keys of the heads, as `head_keys` returns them.
            queries: slice of `whole` with the queries' tokens.
            keys: positions of the keys in the sample; default from 0 to the length of `whole`.
        """
        # Contiguous in this order, so that the result has the memory layout of the attention weights. [batch, 1, queries]
        rows = self.whole[queries].t().contiguous().unsqueeze(1)
        rows = _mix(rows ^ heads.view(1, -1, 1))  # [batch, heads, queries]
        keys = range(self.whole.shape[0]) if keys is None else keys
        return _mix(rows.unsqueeze(-1) + self._hash_indices(self.weight, len(keys), keys.start))

    def _hash_indices(self, key: int, width: int, first: int = 0) -> Tensor:
        """Return hashes of the indices from `first`, int32 `[width]`."""
        return _mix(torch.arange(first, first + width, dtype=torch.int32, device=self.whole.device) ^ key)


def drop(x: Tensor, numbers: Tensor, probability: float) -> Tensor:
    """Apply dropout: return x with elements set to 0 with `probability`, and the others scaled by 1 / (1 - probability).

    Autograd saves only one byte per element for the backward pass.

    Args:
        x: `[...]`.
        numbers: uniform int32, of x's shape; an element is dropped if its number is in the lowest fraction `probability`.
        probability: probability that an element is dropped.
    """
    threshold = round(probability * (1 << 32)) - (1 << 31)  # the lowest int32 is -2^31
    return torch.where(numbers >= threshold, x * (1.0 / (1.0 - probability)), 0.0)
