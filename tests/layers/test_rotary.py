"""Rotary positions: both forms against complex multiplication, and against each other."""

from __future__ import annotations

import pytest
import torch

from megatron.config.schema import ModelSettings
from megatron.model.rotary import Rotary

HEAD, SEQ = 8, 5


def rotate(interleaved: bool, x: torch.Tensor, percent: float = 1.0) -> torch.Tensor:
    positions = torch.arange(3, 3 + SEQ).expand(2, SEQ)
    return Rotary.from_positions(positions, HEAD, percent, 100.0, interleaved).rotate(x)


@pytest.mark.parametrize("percent", [1.0, 0.5])
def test_pairs_of_channels_turn_like_complex_numbers(percent: float) -> None:
    torch.manual_seed(1)
    x = torch.randn(SEQ, 2, 3, HEAD)
    width = int(HEAD * percent)
    angles = torch.arange(3.0, 3 + SEQ).unsqueeze(-1) / 100.0 ** (torch.arange(0, width, 2) / width)
    turn = torch.polar(torch.ones_like(angles), angles)[:, None, None]  # [seq, 1, 1, width / 2]
    pairs = torch.view_as_complex(x[..., :width].unflatten(-1, (-1, 2)).contiguous())
    neighbours = torch.cat([torch.view_as_real(pairs * turn).flatten(-2), x[..., width:]], dim=-1)
    torch.testing.assert_close(rotate(True, x, percent), neighbours)
    halves = torch.complex(x[..., : width // 2], x[..., width // 2 : width]) * turn
    torch.testing.assert_close(rotate(False, x, percent), torch.cat([halves.real, halves.imag, x[..., width:]], dim=-1))


def test_the_two_forms_differ_by_the_order_of_channels_alone() -> None:
    x = torch.randn(SEQ, 2, 3, HEAD)
    order = torch.arange(HEAD).view(2, -1).t().flatten()  # where each neighbour stands among the halves
    torch.testing.assert_close(rotate(True, x[..., order]), rotate(False, x)[..., order])
    assert not torch.allclose(rotate(True, x), rotate(False, x)) and ModelSettings().rotary_interleaved is False
