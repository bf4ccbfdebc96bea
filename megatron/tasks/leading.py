"""One rank leads, the others compute with it: for a program that can run on one rank only, with a model on several.

The leader uses its model as ever. Each call first tells the other ranks what to compute, in a few numbers and the batch's
tokens, and they take their part in it. So the program needs to know nothing of ranks.
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
from megatron.tasks.likelihood import Model

END, SCORES, PREDICTION = range(3)


class Led:
    """The leader's model, which takes the other ranks of `world` along. `finish` lets them go."""

    def __init__(self, model: Model, world: Axis) -> None:
        self.model, self.world = model, world
        self.config, self.device = model.config, model.device

    def eval(self) -> None:
        """Dropout is off on all of them."""
        self.model.eval()

    def scores(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The model's scores, of sequences from position 0 on."""
        self._tell(SCORES, batch, 0)
        return self.model.scores(batch)

    def predict(self, batch: Batch, cache: KVCache | None = None, top: int | None = None) -> Prediction:
        """The model's prediction, of sequences that stay together. top: None, as the other ranks take it."""
        first = cache.length if cache is not None else 0
        self._tell(PREDICTION, batch, first)
        return self.model.predict(batch, cache)

    def finish(self) -> None:
        """Let the other ranks go."""
        all_reduce(torch.tensor([END, 0, 0, 0], device=self.device), self.world)

    def _tell(self, what: int, batch: Batch, first: int) -> None:
        rows, seq = batch.tokens.shape
        all_reduce(torch.tensor([what, rows, seq, first], device=self.device), self.world)
        all_reduce(torch.stack([batch.tokens, batch.labels]), self.world)


def follow(model: Model, world: Axis) -> None:
    """Compute along with the leader until it has finished: what every other rank does. In the sums they add zeros."""
    cache = KVCache()
    while True:
        what, rows, seq, first = all_reduce(torch.zeros(4, dtype=torch.int64, device=model.device), world).tolist()
        if what == END:
            return
        tokens, labels = all_reduce(torch.zeros(2, rows, seq, dtype=torch.int64, device=model.device), world)
        batch = replace(batch_of_rows(tokens.tolist(), first, model.device), labels=labels)
        if what == SCORES:
            model.scores(batch)
        else:
            cache = cache if first else KVCache()
            model.predict(batch, cache)
            cache.length = first + seq
