"""The key-value cache of generation, with which each token is computed only once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class KVCache:
    """Keys and values of the tokens so far, for every layer `[batch, groups, positions, head_dim]`.

    Attributes:
        length: number of positions; the caller advances it after all layers of a pass.
    """

    def __init__(self) -> None:
        self._held: dict[int, tuple[Tensor, Tensor]] = {}
        self.length = 0

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append a layer's new keys and values. Memory grows by doubling.

        Args:
            layer: number of the layer.
            key: `[batch, groups, new positions, head_dim]`.
            value: `[batch, groups, new positions, head_dim]`.

        Returns:
            All keys and values of the layer so far, as views of the cache.
        """
        start, end = self.length, self.length + key.shape[2]
        held = self._held.get(layer)
        if held is None or held[0].shape[2] < end:
            room = (*key.shape[:2], max(64, 2 * end), key.shape[3])
            grown = key.new_empty(room), value.new_empty(room)  # [batch, groups, room, head_dim]
            if held is not None:
                for new, old in zip(grown, held, strict=True):
                    new[:, :, :start] = old[:, :, :start]
            held = self._held[layer] = grown
        held[0][:, :, start:end] = key
        held[1][:, :, start:end] = value
        return held[0][:, :, :end], held[1][:, :, :end]  # each [batch, groups, positions, head_dim]

    def select(self, rows: Sequence[int]) -> None:
        """Keep these sequences of the batch, in this order; one may be taken several times."""
        for layer, (key, value) in self._held.items():
            chosen = torch.tensor(rows, device=key.device)  # [new batch]
            self._held[layer] = key.index_select(0, chosen), value.index_select(0, chosen)
