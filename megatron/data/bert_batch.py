"""Sentence pairs to a micro-batch: padded to the sequence length, with what must be guessed and who may see whom."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from megatron.contract import Batch
from megatron.data.bert import PairSample
from megatron.data.gpt import SampleSource


@dataclass(frozen=True)
class BertCollator:
    """How sentence pairs become a `Batch`. pad: the id of padding. binary: whether the model has a binary head, which wants
    segments and their order."""

    seq_length: int
    pad: int
    binary: bool

    def __call__(self, dataset: SampleSource, numbers: Sequence[int], names: Sequence[int]) -> Batch:
        """The micro-batch of these samples of the dataset, under the given numbers in the training order."""
        return self.of([dataset[number] for number in numbers], names)

    def of(self, samples: Sequence[PairSample], names: Sequence[int]) -> Batch:
        """The micro-batch of these samples, under the given numbers."""
        lengths = np.array([[len(sample.tokens)] for sample in samples])
        places = np.broadcast_to(np.arange(self.seq_length), (len(samples), self.seq_length))
        padding = places >= lengths
        guessed = self._padded([sample.guessed for sample in samples], False)
        firsts = np.array([[sample.first] for sample in samples])
        return Batch(
            tokens=torch.from_numpy(self._padded([sample.tokens for sample in samples], self.pad)),
            labels=torch.from_numpy(np.where(guessed, self._padded([sample.labels for sample in samples], 0), 0)),
            loss_mask=torch.from_numpy(guessed.astype(np.float32)),
            positions=torch.from_numpy(np.array(places, dtype=np.int64)),
            samples=torch.tensor(list(names), dtype=torch.int64),
            documents=torch.from_numpy(padding.astype(np.int64)) if padding.any() else None,
            segments=torch.from_numpy(((places >= firsts) & ~padding).astype(np.int64)) if self.binary else None,
            swapped=torch.tensor([int(sample.swapped) for sample in samples]) if self.binary else None,
        )

    def _padded(self, rows: Sequence[NDArray], fill: int | bool) -> NDArray:  # type: ignore[type-arg]  # ids or flags
        whole = np.full((len(rows), self.seq_length), fill, dtype=rows[0].dtype)
        for place, row in zip(whole, rows, strict=True):
            place[: len(row)] = row
        return whole
