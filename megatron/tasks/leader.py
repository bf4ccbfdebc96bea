"""Let one rank lead and the others compute with it: for a program that runs on one rank only, with a model on several.

The leader uses its model as ever. Each call first tells the other ranks what to compute, in a few numbers and the batch's
tokens, and they take their part in it. So the program needs to know nothing of ranks.
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

END, SCORES, PREDICTION = range(3)  # commands of the leader
NUMBERS = 9  # that describe a piece of a pass, beside its tokens


class LeaderModel:
    """The leader's model, which has the other ranks of `world` compute along. `finish` ends that."""

    def __init__(self, model: LikelihoodModel, world: Axis) -> None:
        self.model, self.world = model, world
        self.config, self.device = model.config, model.device
        self._numbers: WeakKeyDictionary[KVCache, int] = WeakKeyDictionary()  # they name the caches on the other ranks
        self._next_number = count()

    def eval(self) -> None:
        """Put the leader's model into evaluation mode; the others are in it already."""
        self.model.eval()

    def scores(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the model's scores of sequences that start at position 0; both `[seq, batch]`."""
        rows, seq = batch.tokens.shape
        self._command([SCORES, rows, seq, 0], torch.stack([batch.tokens, batch.labels]))
        return self.model.scores(batch)

    def predict(self, pieces: Sequence[NewTokens], top: int = 0) -> Prediction:
        """Return the model's prediction of a pass. The other ranks keep the caches of a pass until the next one.

        Args:
            pieces: the new tokens of some texts.
            top: most probable tokens to tell at each place that is scored.
        """
        told: list[int] = []
        for piece in pieces:
            cache = piece.cache
            if cache not in self._numbers:
                self._numbers[cache] = next(self._next_number)
            told += (self._numbers[cache], cache.rows, cache.room, piece.row, piece.start, piece.rows, piece.count)
            told += (piece.logits, piece.scored)
        for piece in pieces:
            told += (token for row in piece.tokens for token in row)
        self._command([PREDICTION, len(pieces), len(told), top], torch.tensor(told, device=self.device))
        return self.model.predict(pieces, top)

    def finish(self) -> None:
        """End `follow_leader` on the other ranks."""
        self._command([END, 0, 0, 0])

    def _command(self, numbers: list[int], content: Tensor | None = None) -> None:
        """Tell the other ranks to compute. numbers: the command and the size of its content."""
        # The others add zeros, so each sum is a broadcast; the size goes first, since they must know it for the content.
        all_reduce(torch.tensor(numbers, device=self.device), self.world)
        if content is not None:
            all_reduce(content, self.world)


def follow_leader(model: LikelihoodModel, world: Axis) -> None:
    """Compute along with the leader, on every other rank, until it has finished."""
    caches: dict[int, KVCache] = {}

    def hear(*shape: int) -> Tensor:
        return all_reduce(torch.zeros(shape, dtype=torch.int64, device=model.device), world)

    while True:
        command, first, second, top = hear(4).tolist()
        if command == END:
            return
        if command == SCORES:
            tokens, labels = hear(2, first, second)  # each [batch, seq]
            model.scores(replace(batch_of_rows(tokens.tolist(), model.device), labels=labels))
        else:
            caches, pieces = _pieces(hear(second).tolist(), first, caches)
            model.predict(pieces, top)


def _pieces(told: list[int], number: int, caches: dict[int, KVCache]) -> tuple[dict[int, KVCache], list[NewTokens]]:
    """Return the caches and the pieces of the leader's next pass.

    Args:
        told: the numbers that describe the pieces, then their tokens.
        number: of the pieces.
        caches: of the pass before, by number.
    """
    kept: dict[int, KVCache] = {}
    pieces, at = list[NewTokens](), number * NUMBERS
    for begin in range(0, at, NUMBERS):
        name, cache_rows, room, row, start, rows, length, logits, scored = told[begin : begin + NUMBERS]
        kept[name] = kept.get(name) or caches.get(name) or KVCache(cache_rows, room)
        tokens = [told[at + length * i : at + length * (i + 1)] for i in range(rows)]
        pieces.append(NewTokens(kept[name], row, start, tokens, bool(logits), bool(scored)))
        at += rows * length
    return kept, pieces
