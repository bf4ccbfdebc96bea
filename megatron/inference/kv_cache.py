"""The key-value cache of generation, which lets each token be computed once, and the passes that read and fill it.

Each request has a cache of its own, taken once for all the tokens that it may come to: keys and values are written in place,
and attention reads views of them. A pass computes new tokens of any number of caches side by side: everything but attention
treats each token by itself, and attention goes from one piece of the pass to the next.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.contract import Batch


class KVCache:
    """Keys and values of the texts of one request, for every layer: `[rows, groups, room, head_dim]`.

    A layer's memory is taken when it is first written, so that each rank has that of its own layers.

    Args:
        rows: number of texts.
        room: most tokens of a text.
    """

    def __init__(self, rows: int, room: int) -> None:
        self.rows, self.room = rows, room
        self._held: dict[int, tuple[Tensor, Tensor]] = {}

    def extend(self, layer: int, piece: NewTokens, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write a layer's keys and values of new tokens.

        Args:
            layer: its number.
            piece: the tokens.
            key: `[texts of the piece, groups, new tokens, head_dim]`.
            value: the same.

        Returns:
            All keys and values of these texts so far, as views of the cache.
        """
        held = self._held.get(layer)
        if held is None:
            room = (self.rows, key.shape[1], self.room, key.shape[3])
            held = self._held[layer] = key.new_empty(room), value.new_empty(room)  # [rows, groups, room, head_dim]
        rows, end = slice(piece.row, piece.row + piece.rows), piece.start + piece.count
        held[0][rows, :, piece.start : end] = key
        held[1][rows, :, piece.start : end] = value
        return held[0][rows, :, :end], held[1][rows, :, :end]

    def select(self, rows: Sequence[int], length: int) -> None:
        """Let the first rows go on with these texts, in this order; one may be taken several times.

        Args:
            rows: numbers of rows, as many as this cache has at most.
            length: tokens of each text so far.
        """
        for key, value in self._held.values():
            chosen = torch.tensor(rows, device=key.device)  # [new rows]
            for held in (key, value):
                held[: len(rows), :, :length] = held[:, :, :length].index_select(0, chosen)


@dataclass(frozen=True)
class NewTokens:
    """The new tokens of neighbouring texts of one cache, as many of each, at the same positions.

    Attributes:
        cache: holds what is before them.
        row: of the first text.
        start: position of the first new token of each text.
        tokens: of each text.
        logits: whether the logits after the last token of each text are asked for.
        scored: whether the log-probabilities of all tokens but the first one of each text are.
    """

    cache: KVCache
    row: int
    start: int
    tokens: Sequence[Sequence[int]]
    logits: bool = True
    scored: bool = False

    @property
    def rows(self) -> int:
        """Number of texts."""
        return len(self.tokens)

    @property
    def count(self) -> int:
        """Number of new tokens of each text."""
        return len(self.tokens[0])


class Pass:
    """Pieces that are computed together, as one row of tokens: text by text, piece by piece. It is attention's cache.

    Attributes:
        pieces: in order; no two of them with rows in common.
        batch: their tokens, `[1, tokens]`, at their positions.
        last: places of the tokens whose following logits are asked for.
        scored: places of the tokens whose successor in the pass is scored.
    """

    def __init__(self, pieces: Sequence[NewTokens], device: torch.device) -> None:
        self.pieces = pieces
        tokens, positions, self.last, self.scored = list[int](), list[int](), list[int](), list[int]()
        self._places: list[slice] = []
        for piece in pieces:
            first, count = len(tokens), piece.count
            for row in piece.tokens:
                begin = len(tokens)
                tokens += row
                positions += range(piece.start, piece.start + count)
                if piece.logits:
                    self.last.append(len(tokens) - 1)
                if piece.scored:
                    self.scored += range(begin, len(tokens) - 1)
            self._places.append(slice(first, len(tokens)))
        ids = torch.tensor([tokens], device=device)  # [1, tokens]
        samples = torch.zeros(1, dtype=torch.int64, device=device)  # [1]
        mask = torch.zeros(ids.shape, device=device)  # [1, tokens]
        self.batch = Batch(ids, ids, mask, torch.tensor([positions], device=device), samples)

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, core_attention: Callable[[Tensor, Tensor, Tensor], Tensor]
    ) -> Tensor:
        """Return the attended values of all tokens, `[1, heads, tokens, head_dim]`, each piece with its own cache.

        So a text's values do not depend on the texts that are computed beside it, to the last bit.

        Args:
            layer: its number.
            q: `[1, heads, tokens, head_dim]`.
            k: `[1, groups, tokens, head_dim]`.
            v: like k.
            core_attention: attended values of queries, keys and values, `[texts, heads, new tokens, head_dim]`.
        """
        # In memory token by token, as the output projection reads it.
        y = q.new_empty(q.shape[2], q.shape[1], q.shape[3])  # [tokens, heads, head_dim]
        for piece, place in zip(self.pieces, self._places, strict=True):
            rows, count = piece.rows, piece.count
            # Each [texts, heads or groups, new tokens, head_dim].
            queries, key, value = (x[0, :, place].view(x.shape[1], rows, count, x.shape[3]).transpose(0, 1) for x in (q, k, v))
            keys, values = piece.cache.extend(layer, piece, key, value)
            values_here = y[place].view(rows, count, *y.shape[1:]).transpose(1, 2)  # [texts, heads, new tokens, head_dim]
            values_here.copy_(core_attention(queries, keys, values))
        return y.transpose(0, 1).unsqueeze(0)
