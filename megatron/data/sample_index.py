"""Which tokens are sample number i: three arrays that follow from the document lengths, the seed and two counts.

The documents of a split are put one after the other, once per epoch, in shuffled order, and the stream of their tokens is
cut every `seq_length` tokens. Sample j reads from cut j on and one token beyond cut j + 1, so it yields seq_length inputs
and their labels, and overlaps the next sample by one token. The samples are then shuffled. The order equals
Megatron-Core 0.16's `GPTDataset` bit for bit, built in blocks of numpy operations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron.data.errors import DataError

BLOCK = 1 << 20  # documents per step: bounds the working memory
SEPARATE_BELOW = 0.80


@dataclass(frozen=True)
class SampleIndex:
    """documents: int32 `[epochs * documents]`, the sequence at each place of the stream.
    samples: int32 or int64 `[samples + 1, 2]`, each cut as (place in the stream, token within that sequence).
    shuffle: uint32 or int64 `[samples]`, the cut at which each sample of the training order starts.
    """

    documents: NDArray[np.int32]
    samples: NDArray[Any]
    shuffle: NDArray[Any]


@dataclass(frozen=True)
class EpochPlan:
    """How often the documents are read, and where the separately shuffled last epoch starts.

    tokens: of one epoch. first_epochs_samples: how many samples come before the last epoch if that is shuffled apart.
    """

    tokens: int
    epochs: int
    separate_last: bool
    first_epochs_samples: int


def plan_epochs(tokens: int, seq_length: int, wanted: int | None, extra: int = 1) -> EpochPlan:
    """The epochs that `wanted` samples need (None: one epoch), given the tokens of one epoch.

    When less than 80 % of the last epoch is needed it is shuffled apart from the others, so that all documents are seen
    equally often before any is seen once more. DataError if there are no tokens, from which no sample can be made.
    """
    if tokens <= 0:
        raise DataError(f"{tokens} tokens cannot make {wanted if wanted is not None else 'any'} samples of {seq_length} tokens")
    epochs = 1 if wanted is None else max(1, -(-(wanted * seq_length + extra) // tokens))
    before_last = ((epochs - 1) * tokens - extra) // seq_length
    if wanted is None or epochs == 1:
        return EpochPlan(tokens, epochs, False, 0)
    per_epoch = (tokens - extra) // seq_length
    separate = wanted - before_last < int(SEPARATE_BELOW * per_epoch)
    return EpochPlan(tokens, epochs, separate, before_last)


def document_order(
    documents: NDArray[np.int32], epochs: int, separate_last: bool, random: np.random.RandomState
) -> NDArray[np.int32]:
    """The documents, once per epoch, shuffled together; the last epoch on its own if so planned. int32 `[epochs * n]`."""
    first = epochs - 1 if separate_last else epochs
    order = np.tile(np.asarray(documents, dtype=np.int32), epochs)
    random.shuffle(order[: first * len(documents)])
    if separate_last:
        random.shuffle(order[first * len(documents) :])
    return order


def cut_stream(
    lengths: NDArray[np.int32],
    order: NDArray[np.int32],
    tokens: int,
    seq_length: int,
    *,
    extra: int = 1,
    drop_last: bool = True,
) -> NDArray[Any]:
    """Where each sample starts, `[samples + 1, 2]`; the last row is where the last sample ends.

    A cut lies in the document that holds the last token of the sample before it, `extra` tokens short of that sample's
    end. tokens: the sum of lengths over `order`. drop_last: leave out a last sample that the stream cannot fill.
    """
    samples = (tokens - extra) // seq_length if drop_last else -(-(tokens - extra) // seq_length)
    samples = max(samples, 0)
    largest = max(len(order), int(lengths.max(initial=0)))
    cuts = np.zeros((samples + 1, 2), dtype=np.int32 if largest <= np.iinfo(np.int32).max else np.int64)
    done, before = 1, 0
    for start in range(0, len(order), BLOCK):
        ends = np.cumsum(lengths[order[start : start + BLOCK]], dtype=np.int64)
        ends += before
        stop = samples + 1 if ends[-1] >= tokens else (int(ends[-1]) - extra) // seq_length + 1
        if stop > done:
            positions = np.minimum(np.arange(done, stop, dtype=np.int64) * seq_length, tokens - extra)
            places = np.searchsorted(ends, positions + extra, side="left")
            cuts[done:stop, 0] = places + start
            begins = np.where(places > 0, ends[places - 1], before)
            cuts[done:stop, 1] = positions - begins
            done = stop
        before = int(ends[-1])
    rest = int(lengths[order[-1]]) - extra
    if (
        samples * seq_length > tokens - extra and rest >= 0
    ):  # a partial last sample ends with the last document, even an empty one
        cuts[samples] = len(order) - 1, rest
    return cuts


def shuffle_order(first: int, total: int, random: np.random.RandomState) -> NDArray[Any]:
    """A permutation of `range(total)` that shuffles the first `first` and the rest apart. uint32, or int64 if too large."""
    order = np.arange(total, dtype=np.uint32 if total < np.iinfo(np.uint32).max - 1 else np.int64)
    random.shuffle(order[:first])
    if first != total:
        random.shuffle(order[first:])
    return order


def build_sample_index(
    lengths: NDArray[np.int32],
    documents: NDArray[np.int32],
    seq_length: int,
    seed: int,
    wanted: int | None,
    *,
    extra: int = 1,
    drop_last: bool = True,
) -> SampleIndex:
    """The index of at least `wanted` samples (None: one epoch) of `seq_length` tokens from the sequences `documents`.

    lengths: int32, tokens of every sequence of the dataset. extra: tokens a sample has beyond seq_length.
    Raises DataError when the documents hold no tokens.
    """
    tokens = sum(int(lengths[documents[i : i + BLOCK]].sum(dtype=np.int64)) for i in range(0, len(documents), BLOCK))
    plan = plan_epochs(tokens, seq_length, wanted, extra)
    random = np.random.RandomState(seed)
    order = document_order(documents, plan.epochs, plan.separate_last, random)
    cuts = cut_stream(lengths, order, plan.epochs * tokens, seq_length, extra=extra, drop_last=drop_last)
    total = len(cuts) - 1
    return SampleIndex(order, cuts, shuffle_order(plan.first_epochs_samples if plan.separate_last else total, total, random))
