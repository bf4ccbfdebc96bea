"""Samples to a micro-batch: inputs, labels, which losses count, positions."""

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
    """How GPT samples become a `Batch`.

    vocab_size: ids from here on are an error. eod: the id that ends a document, needed by the three options, which are
    those of `--reset-position-ids`, `--reset-attention-mask` and `--eod-mask-loss`.
    """

    vocab_size: int
    eod: int | None = None
    reset_position_ids: bool = False
    reset_attention_mask: bool = False
    eod_mask_loss: bool = False

    def __post_init__(self) -> None:
        options = ("reset_position_ids", "reset_attention_mask", "eod_mask_loss")
        on = [f"--{name.replace('_', '-')}" for name in options if getattr(self, name)]
        if on and self.eod is None:
            raise DataError(f"{', '.join(on)}: the tokenizer has no end of document")

    @staticmethod
    def of(data: DataConfig, vocab_size: int, eod: int | None) -> GPTCollator:
        """As the data settings say."""
        return GPTCollator(vocab_size, eod, data.reset_position_ids, data.reset_attention_mask, data.eod_mask_loss)

    def __call__(self, dataset: SampleSource, numbers: Sequence[int], names: Sequence[int]) -> Batch:
        """The micro-batch of these samples of the dataset, under the given numbers in the training order.

        Raises DataError, with file, document and token, for an id outside of the vocabulary.
        """
        tokens = np.stack([dataset[number].tokens for number in numbers])
        if int(tokens.max()) >= self.vocab_size or int(tokens.min()) < 0:
            row, column = np.argwhere((tokens >= self.vocab_size) | (tokens < 0))[0].tolist()
            raise ForeignIdError(
                f"{dataset.locate(numbers[row], column)}: id {tokens[row, column]} is outside of the vocabulary of "
                f"{self.vocab_size} ids; the data was made with another tokenizer"
            )
        inputs = tokens[:, :-1]
        ends = inputs == (-1 if self.eod is None else self.eod)
        loss_mask = np.where(ends, 0.0, 1.0) if self.eod_mask_loss else np.ones(inputs.shape)
        positions = np.broadcast_to(np.arange(inputs.shape[1]), inputs.shape)
        if self.reset_position_ids:
            positions = positions - document_starts(ends)
        documents = torch.from_numpy(document_indices(ends)) if self.reset_attention_mask else None
        return Batch(
            tokens=torch.from_numpy(np.ascontiguousarray(inputs)),
            labels=torch.from_numpy(np.ascontiguousarray(tokens[:, 1:])),
            loss_mask=torch.from_numpy(loss_mask.astype(np.float32)),
            positions=torch.from_numpy(np.array(positions, dtype=np.int64)),
            samples=torch.tensor(list(names), dtype=torch.int64),
            documents=documents,
        )


def document_indices(ends: NDArray[np.bool_]) -> NDArray[np.int64]:
    """For each position, how many ends of document lie before it: the end itself still belongs to its document."""
    counts = np.zeros(ends.shape, dtype=np.int64)
    np.cumsum(ends[:, :-1], axis=1, out=counts[:, 1:])
    return counts


def document_starts(ends: NDArray[np.bool_]) -> NDArray[np.int64]:
    """For each position, that of the first token of its document (0 for the document the sample begins in)."""
    starts = np.zeros(ends.shape, dtype=np.int64)
    starts[:, 1:] = np.where(ends[:, :-1], np.arange(1, ends.shape[1]), 0)
    return np.maximum.accumulate(starts, axis=1)
