"""Rotary position embedding (arXiv 2104.09864), in the rotate-half form of GPT-NeoX and Llama or in the interleaved one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rotary:
    """Cosines and sines of the tokens' angles. The first `rotary_dim` channels of a head rotate, the others stay.

    Attributes:
        cos: `[seq, batch, 1, rotary_dim]`.
        sin: `[seq, batch, 1, rotary_dim]`.
        interleaved: channels 2i and 2i + 1 rotate as a pair, as in the paper; else channels i and i + rotary_dim / 2.
    """

    cos: Tensor
    sin: Tensor
    interleaved: bool = False

    @classmethod
    def from_positions(cls, positions: Tensor, head_dim: int, percent: float, base: float, interleaved: bool = False) -> Rotary:
        """Compute the angles: pair i at position m rotates by m base^(-2i / rotary_dim), in fp32.

        Args:
            positions: int64 `[batch, seq]`.
            head_dim: channels of a head.
            percent: share of the channels that rotate, 0 to 1.
            base: base of the frequencies, 10000 in the paper.
            interleaved: neighbouring channels form a pair.
        """
        rotary_dim = int(head_dim * percent)
        # [rotary_dim / 2]
        exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float32, device=positions.device) / rotary_dim
        angles = positions.t().float().unsqueeze(-1) / base**exponents  # [seq, batch, rotary_dim / 2]
        # Both channels of a pair have its angle; they are neighbours, or half a head apart. [seq, batch, rotary_dim]
        angles = angles.repeat_interleave(2, dim=-1) if interleaved else torch.cat([angles, angles], dim=-1)
        angles = angles.unsqueeze(2)  # [seq, batch, 1, rotary_dim], for every head
        return cls(angles.cos(), angles.sin(), interleaved)

    def rotate(self, x: Tensor) -> Tensor:
        """Return queries or keys `[seq, batch, heads, head_dim]` rotated by their positions."""
        rotary_dim = self.cos.shape[-1]
        # [seq, batch, heads, rotary_dim], [seq, batch, heads, head_dim - rotary_dim]
        rotating, rest = x[..., :rotary_dim], x[..., rotary_dim:]
        # A pair (a, b) becomes (a cos - b sin, b cos + a sin); `partner` is (-b, a), [seq, batch, heads, rotary_dim].
        if self.interleaved:
            partner = torch.stack([-rotating[..., 1::2], rotating[..., ::2]], dim=-1).flatten(-2)
        else:
            left, right = rotating.chunk(2, dim=-1)  # each [seq, batch, heads, rotary_dim / 2]
            partner = torch.cat([-right, left], dim=-1)
        rotated = rotating * self.cos.to(x.dtype) + partner * self.sin.to(x.dtype)  # [seq, batch, heads, rotary_dim]
        return rotated if rotary_dim == x.shape[-1] else torch.cat([rotated, rest], dim=-1)
