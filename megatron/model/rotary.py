"""Rotary position embedding (arXiv 2104.09864): in the rotate-half form of GPT-NeoX and Llama, or of neighbouring channels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rotary:
    """Cosines and sines of the tokens' angles, `[seq, batch, 1, rotary_dim]`.

    The first `rotary_dim` channels of a head rotate, the others stay.
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
            percent: share of them that rotates, 0 to 1.
            base: of the frequencies, 10000 in the paper.
            interleaved: whether neighbouring channels are a pair.
        """
        rotary_dim = int(head_dim * percent)
        exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float32, device=positions.device) / rotary_dim
        angles = positions.t().float().unsqueeze(-1) / base**exponents  # [seq, batch, rotary_dim / 2]
        # Both channels of a pair have its angle: side by side, or half a head apart.
        angles = angles.repeat_interleave(2, dim=-1) if interleaved else torch.cat([angles, angles], dim=-1)
        angles = angles.unsqueeze(2)  # [seq, batch, 1, rotary_dim], for every head
        return cls(angles.cos(), angles.sin(), interleaved)

    def rotate(self, x: Tensor) -> Tensor:
        """Return queries or keys `[seq, batch, heads, head_dim]` rotated by their positions."""
        rotary_dim = self.cos.shape[-1]
        head, rest = x[..., :rotary_dim], x[..., rotary_dim:]
        # A pair (a, b) becomes (a cos - b sin, b cos + a sin); `partner` is (-b, a).
        if self.interleaved:
            partner = torch.stack([-head[..., 1::2], head[..., ::2]], dim=-1).flatten(-2)
        else:
            left, right = head.chunk(2, dim=-1)  # each [seq, batch, heads, rotary_dim / 2]
            partner = torch.cat([-right, left], dim=-1)
        head = head * self.cos.to(x.dtype) + partner * self.sin.to(x.dtype)
        return head if rotary_dim == x.shape[-1] else torch.cat([head, rest], dim=-1)
