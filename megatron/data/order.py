"""Detect a changed order of training samples by marks: digests of some samples, at fixed positions of the order.

The order follows from the data, the split, the seed, the sequence length, the weights of a blend and the number of epochs, but
not every change of these changes the order. So the samples themselves are compared.
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

MARK_COUNT = 32  # number of marks that are spread over the order
MAX_BLEND_DATASETS = 256  # datasets of a blend whose first and last samples are marked as well
BLEND_WINDOW = 1 << 20  # samples of a blend that are searched for these


def order_marks(dataset: SampleSource, count: int, data: DataConfig, seed: int) -> dict[str, str]:
    """Return the marks of an order: by the position in the training order, the digest of the sample there.

    Args:
        dataset: the training samples.
        count: number of samples that the run will read.
        data: the data settings, which decide whether the loader reshuffles each epoch.
        seed: seed of the reshuffling.
    """
    return _marks(dataset, _places(dataset, min(count, len(dataset))), data, seed)


def order_differs(marks: Mapping[str, Any], dataset: SampleSource | None, data: DataConfig, seed: int) -> bool | None:
    """Return whether a dataset has other samples than the marks say, at a position that both have.

    Args:
        marks: the `order_marks` in a checkpoint.
        dataset: the training samples; None for none.
        data: see `order_marks`.
        seed: see `order_marks`.

    Returns:
        None if there are no marks, or no training samples.
    """
    if not marks or dataset is None:
        return None
    places = [int(place) for place in marks if place.isdecimal() and int(place) < len(dataset)]
    return any(digest != marks[place] for place, digest in _marks(dataset, places, data, seed).items())


def _places(dataset: SampleSource, count: int) -> list[int]:
    """Return the positions to mark, among the first `count` of the training order."""
    places = {count * i // MARK_COUNT for i in range(MARK_COUNT)} if count else set()
    if isinstance(dataset, BlendedDataset) and count:
        # One dataset of a blend may change while the others stay, so each dataset gets marks of its own.
        window = np.asarray(dataset.order[: min(count, BLEND_WINDOW)])
        for numbers in (np.arange(len(window)), np.arange(len(window))[::-1]):
            _, first = np.unique(window[numbers], return_index=True)
            places |= set(numbers[first][:MAX_BLEND_DATASETS].tolist())
    return sorted(places)


def _marks(dataset: SampleSource, places: Sequence[int], data: DataConfig, seed: int) -> dict[str, str]:
    """Return the digests of the samples at some places of the training order."""
    order = epoch_order(seed, 0, len(dataset)) if data.dataloader_type == "cyclic" else None
    marks = {}
    for place in places:
        try:
            sample = dataset[place if order is None else int(order[place])]
        except DataError:
            continue  # training reports the error when it comes to this sample
        digest = hashlib.blake2b(digest_size=8)
        for array in _tokens(sample):
            digest.update(np.ascontiguousarray(array, dtype=np.int64).tobytes() + b"|")
        marks[str(place)] = digest.hexdigest()
    return marks


def _tokens(sample: Any) -> Iterator[NDArray[np.int64]]:
    """Yield the tokens of a sample of any kind, before some of BERT's are masked."""
    # The samples of tasks have rows, whose labels are answers and whose tokens are not masked.
    for row in getattr(sample, "rows", None) or [sample]:
        yield row.labels if row is sample and isinstance(row, PairSample) else row.tokens
