"""Index of GPT samples: three arrays, computed from document lengths, sequence length, number of samples and seed.

The documents of a split are concatenated in shuffled order, once per epoch, and the stream of their tokens is cut every
`seq_length` tokens. Sample j begins at cut j and ends one token after cut j + 1, so that it has `seq_length` inputs and their
labels, and overlaps the next sample by one token. Then the samples are shuffled. The order is exactly that of Megatron-Core
0.16's `GPTDataset`, computed with numpy in blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron.data.errors import DataError

BLOCK = 1 << 20  # documents that are processed at a time, to bound memory
SEPARATE_BELOW = 0.80  # fraction of the last epoch below which it is shuffled separately, as in Megatron-Core


@dataclass(frozen=True)
class SampleIndex:
    """The three arrays that locate the tokens of each sample.

    Attributes:
        documents: int32 `[epochs * documents]`, the numbers of the sequences in the order of the stream.
        samples: int32 or int64 `[samples + 1, 2]`, each cut as (index in `documents`, token within that sequence).
        shuffle: uint32 or int64 `[samples]`, the cut at which each sample of the training order starts.
    """

    documents: NDArray[np.int32]
    samples: NDArray[Any]
    shuffle: NDArray[Any]


@dataclass(frozen=True)
class EpochPlan:
    """The number of epochs, and where the last one starts if it is shuffled separately.

    Attributes:
        tokens: number of tokens of one epoch.
        epochs: number of epochs.
        separate_last: whether the last epoch is shuffled separately.
        first_epochs_samples: number of samples before the last epoch; 0 if there is only one epoch.
    """

    tokens: int
    epochs: int
    separate_last: bool
    first_epochs_samples: int


def plan_epochs(tokens: int, seq_length: int, num_samples: int | None, extra: int = 1) -> EpochPlan:
    """Return the plan of epochs for a number of samples.

    If less than 80 % of the last epoch is needed, it is shuffled separately, so that all documents are read equally often
    before some are read again.

    Args:
        tokens: number of tokens of one epoch.
        seq_length: input tokens of a sample.
        num_samples: number of samples; None for one epoch.
        extra: number of tokens that a sample has in addition to `seq_length`; 1 for the last label.

    Raises:
        DataError: if there are no tokens.
    """
    if tokens <= 0:
        raise DataError(
            f"{tokens} tokens cannot make {num_samples if num_samples is not None else 'any'} samples of {seq_length} tokens"
        )
    epochs = 1 if num_samples is None else max(1, -(-(num_samples * seq_length + extra) // tokens))  # rounded up
    before_last = ((epochs - 1) * tokens - extra) // seq_length
    if num_samples is None or epochs == 1:
        return EpochPlan(tokens, epochs, False, 0)
    per_epoch = (tokens - extra) // seq_length
    separate_last = num_samples - before_last < int(SEPARATE_BELOW * per_epoch)
    return EpochPlan(tokens, epochs, separate_last, before_last)


def document_order(
    documents: NDArray[np.int32], epochs: int, separate_last: bool, random: np.random.RandomState
) -> NDArray[np.int32]:
    """Return the documents of all epochs in shuffled order.

    Args:
        documents: int32 `[n]`, numbers of sequences.
        epochs: number of times that each sequence is read.
        separate_last: shuffle the last epoch on its own, the others together.
        random: generator of the shuffles, used as in Megatron-Core.

    Returns:
        int32 `[epochs * n]`.
    """
    joint_epochs = epochs - 1 if separate_last else epochs
    order = np.tile(np.asarray(documents, dtype=np.int32), epochs)
    random.shuffle(order[: joint_epochs * len(documents)])  # a slice is a view, so this shuffles `order`
    if separate_last:
        random.shuffle(order[joint_epochs * len(documents) :])
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
    """Cut the stream of tokens into samples.

    A cut is in the document with the last token of the sample before it, `extra` tokens before that sample's end.

    Args:
        lengths: int32, tokens of every sequence of the dataset.
        order: int32 `[n]`, the numbers of the sequences in the order of the stream.
        tokens: sum of the lengths over `order`.
        seq_length: input tokens of a sample.
        extra: number of tokens that a sample has in addition to `seq_length`; 1 for the last label.
        drop_last: leave out a last sample that is not full.

    Returns:
        `[samples + 1, 2]`: index in `order` and token in that sequence at which each sample starts; the last row is the end of
        the last sample.
    """
    samples = (tokens - extra) // seq_length if drop_last else -(-(tokens - extra) // seq_length)
    samples = max(samples, 0)
    largest = max(len(order), int(lengths.max(initial=0)))
    cuts = np.zeros((samples + 1, 2), dtype=np.int32 if largest <= np.iinfo(np.int32).max else np.int64)
    done, before = 1, 0  # rows of `cuts` that are filled, tokens before the block
    for start in range(0, len(order), BLOCK):
        ends = np.cumsum(lengths[order[start : start + BLOCK]], dtype=np.int64)  # [block], tokens up to the end of each
        ends += before
        # The cuts in `[done, stop)` are in this block.
        stop = samples + 1 if ends[-1] >= tokens else (int(ends[-1]) - extra) // seq_length + 1
        if stop > done:
            positions = np.minimum(np.arange(done, stop, dtype=np.int64) * seq_length, tokens - extra)
            places = np.searchsorted(ends, positions + extra, side="left")
            cuts[done:stop, 0] = places + start
            # At place 0, ends[-1] is read and discarded.
            begins = np.where(places > 0, ends[places - 1], before)
            cuts[done:stop, 1] = positions - begins
            done = stop
        before = int(ends[-1])
    last_token = int(lengths[order[-1]]) - extra
    # A last sample that is not full ends with the last document, even if that is empty.
    if samples * seq_length > tokens - extra and last_token >= 0:
        cuts[samples] = len(order) - 1, last_token
    return cuts


def shuffle_order(first: int, total: int, random: np.random.RandomState) -> NDArray[Any]:
    """Return a permutation of `range(total)`, uint32, or int64 if too large.

    Args:
        first: the first `first` numbers are shuffled separately from the others.
        total: size of the permutation.
        random: generator of the shuffles.
    """
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
    num_samples: int | None,
    *,
    extra: int = 1,
    drop_last: bool = True,
) -> SampleIndex:
    """Build the index of the samples of a split.

    Args:
        lengths: int32, tokens of every sequence of the dataset.
        documents: int32 `[n]`, numbers of the sequences in the split.
        seq_length: input tokens of a sample.
        seed: seed of both shuffles.
        num_samples: minimum number of samples; None for one epoch.
        extra: number of tokens that a sample has in addition to `seq_length`; 1 for the last label.
        drop_last: leave out a last sample that is not full.

    Raises:
        DataError: if the documents have no tokens.
    """
    tokens = sum(int(lengths[documents[i : i + BLOCK]].sum(dtype=np.int64)) for i in range(0, len(documents), BLOCK))
    plan = plan_epochs(tokens, seq_length, num_samples, extra)
    # Both shuffles draw from one generator, and the order of samples depends on their order.
    random = np.random.RandomState(seed)
    order = document_order(documents, plan.epochs, plan.separate_last, random)
    cuts = cut_stream(lengths, order, plan.epochs * tokens, seq_length, extra=extra, drop_last=drop_last)
    total = len(cuts) - 1
    return SampleIndex(order, cuts, shuffle_order(plan.first_epochs_samples if plan.separate_last else total, total, random))
