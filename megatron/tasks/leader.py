"""Use a model that is divided over several ranks from a program that runs on one of them, the leader.

The program calls the leader's model like any other. Each call first broadcasts a command and the batch's tokens to the other
ranks, which then compute their parts. So the program need not know about ranks.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from megatron.contract import Batch
from megatron.inference.generate import batch_of_rows
from megatron.inference.kv_cache import KVCache
from megatron.inference.prediction import Prediction
from megatron.mesh.mesh import Axis
from megatron.parallel.collectives import all_reduce
from megatron.tasks.likelihood import LikelihoodModel

END, SCORES, PREDICTION = range(3)  # commands of the leader


class LeaderModel:
    """The model on the leader's rank; each call also runs the other ranks of `world`, until `finish`."""

    def __init__(self, model: LikelihoodModel, world: Axis) -> None:
        self.model, self.world = model, world
        self.config, self.device = model.config, model.device

    def eval(self) -> None:
        """Put the leader's part of the model into evaluation mode; the other parts are in it already."""
        self.model.eval()

    def scores(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the model's scores of sequences that start at position 0; both `[seq, batch]`."""
        self._command(SCORES, batch, 0)
        return self.model.scores(batch)

    def predict(self, batch: Batch, cache: KVCache | None = None, top: int | None = None) -> Prediction:
        """Return the model's prediction for sequences of one length.

        Args:
            batch: tokens `[batch, seq]`.
            cache: keys and values of the tokens before; None for none.
            top: not used: the other ranks compute all logits.
        """
        first = cache.length if cache is not None else 0
        self._command(PREDICTION, batch, first)
        return self.model.predict(batch, cache)

    def finish(self) -> None:
        """End `follow_leader` on the other ranks."""
        all_reduce(torch.tensor([END, 0, 0, 0], device=self.device), self.world)

    def _command(self, command: int, batch: Batch, first: int) -> None:
        """Send a command and its batch to the other ranks. first: position of the first token, 0 for a new cache."""
        rows, seq = batch.tokens.shape
        # The other ranks add zeros, so each sum is a broadcast. The shape is sent first, for the buffer of the tokens. [4]
        all_reduce(torch.tensor([command, rows, seq, first], device=self.device), self.world)
        all_reduce(torch.stack([batch.tokens, batch.labels]), self.world)  # [2, batch, seq]


def follow_leader(model: LikelihoodModel, world: Axis) -> None:
    """Compute this rank's part of the leader's calls, on every other rank, until the leader has finished."""
    cache = KVCache()
    while True:
        # [4]
        command, rows, seq, first = all_reduce(torch.zeros(4, dtype=torch.int64, device=model.device), world).tolist()
        if command == END:
            return
        # [2, batch, seq]: tokens and labels
        tokens, labels = all_reduce(torch.zeros(2, rows, seq, dtype=torch.int64, device=model.device), world)
        batch = replace(batch_of_rows(tokens.tolist(), first, model.device), labels=labels)
        if command == SCORES:
            model.scores(batch)
        else:
            cache = cache if first else KVCache()
            model.predict(batch, cache)
            cache.length = first + seq
