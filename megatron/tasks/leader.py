"""Use a model on several ranks from a program that runs on one of them, the leader, and knows nothing of the others.

The leader calls its model as usual. Each call first sends the other ranks a command, which is a few numbers and the tokens of
the batch, and they compute their part of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from megatron.contract import Batch
from megatron.inference.generate import batch_of_rows
from megatron.inference.kv_cache import KVCache, NewTokens
from megatron.inference.prediction import Prediction
from megatron.mesh.mesh import Axis
from megatron.parallel.collectives import all_reduce
from megatron.tasks.likelihood import LikelihoodModel

FINISH, SCORE, PREDICT = range(3)  # the leader's commands
PIECE_FIELDS = 9  # numbers that describe one `NewTokens` of a command, before the tokens


class LeaderModel:
    """The model as the leader uses it: each call makes the other ranks of `world` compute too, until `finish`."""

    def __init__(self, model: LikelihoodModel, world: Axis) -> None:
        self.model, self.world = model, world
        self.config, self.device = model.config, model.device
        self._cache_ids: WeakKeyDictionary[KVCache, int] = WeakKeyDictionary()  # the other ranks know the caches by these
        self._next_id = count()

    def eval(self) -> None:
        """Set the leader's model to evaluation mode, in which the other ranks already are."""
        self.model.eval()

    def scores(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the model's scores of sequences that start at position 0; both `[seq, batch]`."""
        rows, seq = batch.tokens.shape
        self._command([SCORE, rows, seq, 0], torch.stack([batch.tokens, batch.labels]))
        return self.model.scores(batch)

    def predict(self, pieces: Sequence[NewTokens], top: int = 0) -> Prediction:
        """Return the model's prediction for a forward pass. The other ranks drop caches that a pass does not use.

        Args:
            pieces: new tokens of some texts, with their caches.
            top: number of most probable tokens to return at each scored position.
        """
        message: list[int] = []  # PIECE_FIELDS numbers for each piece, then the tokens of all pieces
        for piece in pieces:
            cache = piece.cache
            if cache not in self._cache_ids:
                self._cache_ids[cache] = next(self._next_id)
            message += (self._cache_ids[cache], cache.rows, cache.room, piece.row, piece.start, piece.rows, piece.count)
            message += (piece.logits, piece.scored)
        for piece in pieces:
            message += (token for row in piece.tokens for token in row)
        self._command([PREDICT, len(pieces), len(message), top], torch.tensor(message, device=self.device))
        return self.model.predict(pieces, top)

    def finish(self) -> None:
        """End `follow_leader` on the other ranks."""
        self._command([FINISH, 0, 0, 0])

    def _command(self, header: list[int], content: Tensor | None = None) -> None:
        """Send a command to the other ranks. header: command, two sizes of its content, and `top` or 0."""
        # The others contribute zeros, so each sum is a broadcast. They need the sizes in the header to receive the content.
        all_reduce(torch.tensor(header, device=self.device), self.world)
        if content is not None:
            all_reduce(content, self.world)


def follow_leader(model: LikelihoodModel, world: Axis) -> None:
    """Execute the leader's commands, on every other rank, until it calls `finish`."""
    caches: dict[int, KVCache] = {}

    def receive(*shape: int) -> Tensor:
        return all_reduce(torch.zeros(shape, dtype=torch.int64, device=model.device), world)

    while True:
        command, first, second, top = receive(4).tolist()
        if command == FINISH:
            return
        if command == SCORE:
            tokens, labels = receive(2, first, second)  # each [batch, seq]
            model.scores(replace(batch_of_rows(tokens.tolist(), model.device), labels=labels))
        else:
            caches, pieces = _decode_pieces(receive(second).tolist(), first, caches)
            model.predict(pieces, top)


def _decode_pieces(
    message: list[int], num_pieces: int, old_caches: dict[int, KVCache]
) -> tuple[dict[int, KVCache], list[NewTokens]]:
    """Return the caches, by id, and the pieces of the leader's forward pass.

    Args:
        message: the numbers that describe each piece, then the tokens of all pieces.
        num_pieces: number of pieces in the message.
        old_caches: caches of the previous pass, by id.
    """
    caches: dict[int, KVCache] = {}
    pieces, position = list[NewTokens](), num_pieces * PIECE_FIELDS
    for begin in range(0, position, PIECE_FIELDS):
        cache_id, cache_rows, room, row, start, rows, length, logits, scored = message[begin : begin + PIECE_FIELDS]
        caches[cache_id] = caches.get(cache_id) or old_caches.get(cache_id) or KVCache(cache_rows, room)
        tokens = [message[position + length * i : position + length * (i + 1)] for i in range(rows)]
        pieces.append(NewTokens(caches[cache_id], row, start, tokens, bool(logits), bool(scored)))
        position += rows * length
    return caches, pieces
