"""Collate GPT samples into a micro-batch: inputs, labels, loss mask, positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from megatron.config.schema import DataConfig
from megatron.contract import Batch
from megatron.data.errors import DataError, ForeignIdError
from megatron.data.gpt import SampleSource


@dataclass(frozen=True)
class GPTCollator:
    """Collate GPT samples into a `Batch`.

    Attributes:
        vocab_size: number of ids of the vocabulary; ids outside `[0, vocab_size)` are an error.
        eod: id of the end-of-document token; required by each of the three options below.
        reset_position_ids: as `--reset-position-ids`.
        reset_attention_mask: as `--reset-attention-mask`.
        eod_mask_loss: as `--eod-mask-loss`.
    """

    vocab_size: int
    eod: int | None = None
    reset_position_ids: bool = False
    reset_attention_mask: bool = False
    eod_mask_loss: bool = False

    def __post_init__(self) -> None:
        options = ("reset_position_ids", "reset_attention_mask", "eod_mask_loss")
        enabled = [f"--{name.replace('_', '-')}" for name in options if getattr(self, name)]
        if enabled and self.eod is None:
            raise DataError(f"{', '.join(enabled)}: the tokenizer has no end of document")

    @staticmethod
    def from_config(data: DataConfig, vocab_size: int, eod: int | None) -> GPTCollator:
        """Return the collator with the options of the data settings.

        Args:
            data: the data settings, with the three options.
            vocab_size: number of token ids.
            eod: id of the end-of-document token; None if the tokenizer has none.

        Raises:
            DataError: if an option needs the end-of-document token and the tokenizer has none.
        """
        return GPTCollator(vocab_size, eod, data.reset_position_ids, data.reset_attention_mask, data.eod_mask_loss)

    def __call__(self, dataset: SampleSource, indices: Sequence[int], sample_ids: Sequence[int]) -> Batch:
        """Collate samples of a dataset into a micro-batch.

        Args:
            dataset: yields samples with `tokens`, int64 `[seq + 1]`.
            indices: indices of the samples in the dataset.
            sample_ids: positions of the samples in the training order, which determine their dropout masks.

        Returns:
            Tensors `[batch, seq]`; `documents` only with `reset_attention_mask`.

        Raises:
            ForeignIdError: if an id is outside the vocabulary; the message names file, document and token.
        """
        tokens = np.stack([dataset[index].tokens for index in indices])  # [batch, seq + 1]
        if int(tokens.max()) >= self.vocab_size or int(tokens.min()) < 0:
            row, column = np.argwhere((tokens >= self.vocab_size) | (tokens < 0))[0].tolist()
            raise ForeignIdError(
                f"{dataset.locate(indices[row], column)}: id {tokens[row, column]} is outside of the vocabulary of "
                f"{self.vocab_size} ids; the data was made with another tokenizer"
            )
        inputs = tokens[:, :-1]  # [batch, seq]
        # Without an end-of-document token, -1 matches nothing, since negative ids were rejected above.
        ends = inputs == (-1 if self.eod is None else self.eod)  # bool [batch, seq]
        loss_mask = np.where(ends, 0.0, 1.0) if self.eod_mask_loss else np.ones(inputs.shape)  # [batch, seq]
        positions = np.broadcast_to(np.arange(inputs.shape[1]), inputs.shape)  # [batch, seq]
        if self.reset_position_ids:
            positions = positions - document_starts(ends)
        documents = torch.from_numpy(document_indices(ends)) if self.reset_attention_mask else None
        return Batch(
            tokens=torch.from_numpy(np.ascontiguousarray(inputs)),  # [batch, seq]
            labels=torch.from_numpy(np.ascontiguousarray(tokens[:, 1:])),  # [batch, seq]
            loss_mask=torch.from_numpy(loss_mask.astype(np.float32)),  # [batch, seq]
            positions=torch.from_numpy(np.array(positions, dtype=np.int64)),  # [batch, seq]
            samples=torch.tensor(list(sample_ids), dtype=torch.int64),  # [batch]
            documents=documents,
        )


def document_indices(ends: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return the index of each token's document in its row, int64 `[batch, seq]`.

    ends: bool `[batch, seq]`, true at end-of-document tokens, each of which belongs to the document that it ends.
    """
    counts = np.zeros(ends.shape, dtype=np.int64)  # [batch, seq]
    np.cumsum(ends[:, :-1], axis=1, out=counts[:, 1:])  # shifted by one: the end token still belongs to its document
    return counts


def document_starts(ends: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return the position at which each token's document starts, int64 `[batch, seq]`.

    ends: see `document_indices`. The document in which a sample begins starts at 0.
    """
    starts = np.zeros(ends.shape, dtype=np.int64)  # [batch, seq]
    starts[:, 1:] = np.where(ends[:, :-1], np.arange(1, ends.shape[1]), 0)
    return np.maximum.accumulate(starts, axis=1)
