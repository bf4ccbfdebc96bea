"""Collate sentence pairs into a micro-batch, padded to the sequence length."""

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
    """Collate sentence pairs into a `Batch`.

    Attributes:
        seq_length: tokens of a padded row.
        pad_id: id of the padding token.
        binary_head: whether the model has a binary head, which needs the segment of each token and the order of the segments.
    """

    seq_length: int
    pad_id: int
    binary_head: bool

    def __call__(self, dataset: SampleSource, indices: Sequence[int], sample_ids: Sequence[int]) -> Batch:
        """Collate samples of a dataset into a micro-batch.

        Args:
            dataset: yields `PairSample`s.
            indices: indices of the samples in the dataset.
            sample_ids: positions of the samples in the training order, which determine their dropout masks.

        Returns:
            Tensors `[batch, seq]`, as `collate` makes them.
        """
        return self.collate([dataset[index] for index in indices], sample_ids)

    def collate(self, samples: Sequence[PairSample], sample_ids: Sequence[int]) -> Batch:
        """Return the micro-batch of these samples. sample_ids: see `__call__`.

        Padding tokens form a document of their own, so that no other token attends to them.
        """
        lengths = np.array([[len(sample.tokens)] for sample in samples])  # [batch, 1]
        positions = np.broadcast_to(np.arange(self.seq_length), (len(samples), self.seq_length))  # [batch, seq]
        padding = positions >= lengths  # bool [batch, seq]
        loss_mask = self._pad([sample.loss_mask for sample in samples], False)  # bool [batch, seq]
        first_lengths = np.array([[sample.first_length] for sample in samples])  # [batch, 1]
        in_second = (positions >= first_lengths) & ~padding  # bool [batch, seq]
        return Batch(
            tokens=torch.from_numpy(self._pad([sample.tokens for sample in samples], self.pad_id)),
            labels=torch.from_numpy(np.where(loss_mask, self._pad([sample.labels for sample in samples], 0), 0)),
            loss_mask=torch.from_numpy(loss_mask.astype(np.float32)),
            positions=torch.from_numpy(np.array(positions, dtype=np.int64)),
            samples=torch.tensor(list(sample_ids), dtype=torch.int64),
            documents=torch.from_numpy(padding.astype(np.int64)) if padding.any() else None,
            segments=torch.from_numpy(in_second.astype(np.int64)) if self.binary_head else None,
            swapped=torch.tensor([int(sample.swapped) for sample in samples]) if self.binary_head else None,
        )

    def _pad(self, rows: Sequence[NDArray], fill: int | bool) -> NDArray:  # type: ignore[type-arg]  # ids or flags
        """Return rows of different lengths as one array `[batch, seq]`, padded at the end."""
        padded = np.full((len(rows), self.seq_length), fill, dtype=rows[0].dtype)
        for target, row in zip(padded, rows, strict=True):
            target[: len(row)] = row
        return padded
