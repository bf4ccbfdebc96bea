"""Detect a changed order of training samples by marks, which are digests of the samples at some positions of the order.

The order is determined by the data, the split, the seed, the sequence length, the weights of a blend and the number of epochs,
but not every change of these changes it. So the samples themselves are compared.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron.config.schema import DataConfig
from megatron.data.bert import PairSample
from megatron.data.blend import BlendedDataset
from megatron.data.errors import DataError
from megatron.data.gpt import SampleSource
from megatron.data.loader import epoch_order

MARK_COUNT = 32  # number of marks that are spread evenly over the order
MAX_BLEND_DATASETS = 256  # number of datasets of a blend whose first and last samples are marked, too
BLEND_WINDOW = 1 << 20  # number of a blend's first samples that are searched for these samples


def order_marks(dataset: SampleSource, count: int, data: DataConfig, seed: int) -> dict[str, str]:
    """Return the marks of an order: digests of samples, by position in the training order.

    Args:
        dataset: the training samples.
        count: number of samples that the run will read.
        data: the data settings, which decide whether the loader reshuffles each epoch.
        seed: seed of the reshuffling.
    """
    return _digests(dataset, _marked_positions(dataset, min(count, len(dataset))), data, seed)


def order_differs(marks: Mapping[str, Any], dataset: SampleSource | None, data: DataConfig, seed: int) -> bool | None:
    """Return whether a dataset's samples differ from the marks at a position that both have.

    Args:
        marks: the `order_marks` of a checkpoint.
        dataset: the training samples; None if there are none.
        data: see `order_marks`.
        seed: see `order_marks`.

    Returns:
        None if there are no marks, or no training samples.
    """
    if not marks or dataset is None:
        return None
    positions = [int(position) for position in marks if position.isdecimal() and int(position) < len(dataset)]
    return any(digest != marks[position] for position, digest in _digests(dataset, positions, data, seed).items())


def _marked_positions(dataset: SampleSource, count: int) -> list[int]:
    """Return the positions to mark, among the first `count` of the training order."""
    positions = {count * i // MARK_COUNT for i in range(MARK_COUNT)} if count else set()
    if isinstance(dataset, BlendedDataset) and count:
        # One dataset of a blend may change while the others do not, so each dataset gets its own marks.
        window = np.asarray(dataset.order[: min(count, BLEND_WINDOW)])
        for numbers in (np.arange(len(window)), np.arange(len(window))[::-1]):
            _, first = np.unique(window[numbers], return_index=True)
            positions |= set(numbers[first][:MAX_BLEND_DATASETS].tolist())
    return sorted(positions)


def _digests(dataset: SampleSource, positions: Sequence[int], data: DataConfig, seed: int) -> dict[str, str]:
    """Return the digests of the samples at some positions of the training order."""
    order = epoch_order(seed, 0, len(dataset)) if data.dataloader_type == "cyclic" else None
    marks = {}
    for position in positions:
        try:
            sample = dataset[position if order is None else int(order[position])]
        except DataError:
            continue  # training reports the error when it reaches this sample
        digest = hashlib.blake2b(digest_size=8)
        for array in _unmasked_tokens(sample):
            digest.update(np.ascontiguousarray(array, dtype=np.int64).tobytes() + b"|")
        marks[str(position)] = digest.hexdigest()
    return marks


def _unmasked_tokens(sample: Any) -> Iterator[NDArray[np.int64]]:
    """Yield the token arrays of a sample of any kind; for BERT, those before masking."""
    # Samples of fine-tuning tasks have rows, whose labels are answers and whose tokens are not masked.
    for row in getattr(sample, "rows", None) or [sample]:
        yield row.labels if row is sample and isinstance(row, PairSample) else row.tokens
