"""Rotary position embedding (arXiv 2104.09864), in the rotate-half form of GPT-NeoX and Llama."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rotary:
    """Cosines and sines for the tokens at hand, `[seq, batch, 1, turned]`; the first `turned` channels of a head turn."""

    cos: Tensor
    sin: Tensor

    @classmethod
    def at(cls, positions: Tensor, head_dim: int, percent: float, base: float) -> Rotary:
        """positions: int64 `[batch, seq]`. Angles are computed in fp32."""
        turned = int(head_dim * percent)
        powers = torch.arange(0, turned, 2, dtype=torch.float32, device=positions.device) / turned
        angles = positions.t().float().unsqueeze(-1) / base**powers  # [seq, batch, turned / 2]
        angles = torch.cat([angles, angles], dim=-1).unsqueeze(2)
        return cls(angles.cos(), angles.sin())

    def turn(self, x: Tensor) -> Tensor:
        """Queries or keys `[seq, batch, heads, head_dim]`, rotated by their positions."""
        turned = self.cos.shape[-1]
        head, rest = x[..., :turned], x[..., turned:]
        left, right = head.chunk(2, dim=-1)
        half = torch.cat([-right, left], dim=-1)
        head = head * self.cos.to(x.dtype) + half * self.sin.to(x.dtype)
        return head if turned == x.shape[-1] else torch.cat([head, rest], dim=-1)
