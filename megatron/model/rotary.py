"""Rotary position embedding (arXiv 2104.09864): in the rotate-half form of GPT-NeoX and Llama, or of neighbouring channels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rotary:
    """Cosines and sines for the tokens at hand, `[seq, batch, 1, turned]`; the first `turned` channels of a head turn.

    interleaved: channels 2i and 2i + 1 turn as a pair, as in the paper; else channels i and i + turned / 2.
    """

    cos: Tensor
    sin: Tensor
    interleaved: bool = False

    @classmethod
    def at(cls, positions: Tensor, head_dim: int, percent: float, base: float, interleaved: bool = False) -> Rotary:
        """Compute the angles, in fp32.

        Args:
            positions: int64 `[batch, seq]`.
            head_dim: channels of a head.
            percent: share of them that turns.
            base: of the frequencies.
            interleaved: whether neighbouring channels are a pair.
        """
        turned = int(head_dim * percent)
        powers = torch.arange(0, turned, 2, dtype=torch.float32, device=positions.device) / turned
        angles = positions.t().float().unsqueeze(-1) / base**powers  # [seq, batch, turned / 2]
        angles = angles.repeat_interleave(2, dim=-1) if interleaved else torch.cat([angles, angles], dim=-1)
        angles = angles.unsqueeze(2)
        return cls(angles.cos(), angles.sin(), interleaved)

    def turn(self, x: Tensor) -> Tensor:
        """Queries or keys `[seq, batch, heads, head_dim]`, rotated by their positions."""
        turned = self.cos.shape[-1]
        head, rest = x[..., :turned], x[..., turned:]
        if self.interleaved:
            partner = torch.stack([-head[..., 1::2], head[..., ::2]], dim=-1).flatten(-2)
        else:
            left, right = head.chunk(2, dim=-1)
            partner = torch.cat([-right, left], dim=-1)
        head = head * self.cos.to(x.dtype) + partner * self.sin.to(x.dtype)
        return head if turned == x.shape[-1] else torch.cat([head, rest], dim=-1)
