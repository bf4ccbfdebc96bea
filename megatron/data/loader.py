"""Load the micro-batches of one data-parallel rank, in order.

The whole state is one integer, the number of samples that all ranks together have consumed. Sample n of the training order
is therefore the same for every layout. With d data-parallel ranks and micro-batches of b samples, micro-batch j of
rank r consists of the b samples from `consumed + (j * d + r) * b` on. Blocks of d * b samples do not depend on the global batch
size, so that it may change between steps although batches are read ahead.
"""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

from megatron.contract import Batch
from megatron.data.errors import DataError
from megatron.data.gpt import SampleSource

Collate = Callable[[SampleSource, Sequence[int], Sequence[int]], Batch]


class MicroBatchLoader:
    """Loads this rank's micro-batches.

    Args:
        dataset: the samples.
        collate: makes a micro-batch from the dataset, the indices of samples in it, and their positions in the training
            order, as `GPTCollator` does.
        dp_rank: this rank's index on the data-parallel axis.
        dp_size: size of the data-parallel axis.
        micro_batch_size: samples of a micro-batch.
        consumed: number of samples that all ranks together have consumed.
        read_ahead: number of micro-batches that a thread prepares in advance; 0 prepares them on request.
        cyclic: repeat the dataset, reshuffled for each epoch; otherwise read it once, in its own order.
        seed: seed of the reshuffling.
        pin_memory: put batches into pinned memory.
        name: name of the split, for messages.
    """

    def __init__(
        self,
        dataset: SampleSource,
        collate: Collate,
        dp_rank: int,
        dp_size: int,
        micro_batch_size: int,
        consumed: int = 0,
        *,
        read_ahead: int = 2,
        cyclic: bool = False,
        seed: int = 1234,
        pin_memory: bool = False,
        name: str = "training",
    ) -> None:
        if not 0 <= dp_rank < dp_size or micro_batch_size < 1 or consumed < 0:
            raise ValueError(f"rank {dp_rank} of {dp_size}, micro-batches of {micro_batch_size}, {consumed} consumed")
        self.dataset, self.consumed, self.name, self.cyclic = dataset, consumed, name, cyclic
        self.block = dp_size * micro_batch_size  # number of samples in one micro-batch of every rank
        first = consumed + dp_rank * micro_batch_size
        self._source = iter_micro_batches(
            dataset, collate, first, micro_batch_size, self.block, seed=seed if cyclic else None, pin=pin_memory
        )
        self._ahead = ReadAhead(self._source, read_ahead) if read_ahead > 0 else None
        self._failure: Exception | None = None
        if self._ahead is not None:  # stop the thread of a loader that is garbage-collected without `close`
            weakref.finalize(self, self._ahead.stop)

    def next_batches(self, global_batch_size: int) -> list[Batch]:
        """Return this rank's micro-batches of one step. global_batch_size: samples of the step on all ranks.

        Raises:
            ValueError: if it is not a multiple of micro-batch size x data-parallel size.
            DataError: if too few samples are left, or a token id is invalid; `consumed` is not changed.
        """
        if global_batch_size < 1 or global_batch_size % self.block:
            raise ValueError(
                f"global batch {global_batch_size}: not a multiple of micro-batch x data-parallel size, {self.block}"
            )
        if self._failure is not None:
            raise self._failure
        if not self.cyclic and self.consumed + global_batch_size > len(self.dataset):
            raise DataError(
                f"out of {self.name} data: {self.consumed} samples are used and the next step takes {global_batch_size}, "
                f"but the dataset was built with {len(self.dataset)}"
            )
        count = global_batch_size // self.block
        try:
            batches = [next(self._source) if self._ahead is None else self._ahead.get() for _ in range(count)]
        except Exception as error:
            self._failure = error  # a generator ends when it raises, so the next call must raise the error again
            raise
        self.consumed += global_batch_size
        return batches

    def close(self) -> None:
        """Stop the reading thread at once; otherwise it stops when the loader is garbage-collected."""
        if self._ahead is not None:
            self._ahead.stop()


def iter_micro_batches(
    dataset: SampleSource, collate: Collate, first: int, size: int, stride: int, *, seed: int | None, pin: bool
) -> Iterator[Batch]:
    """Yield one rank's micro-batches.

    Args:
        dataset: the samples.
        collate: makes a micro-batch of samples.
        first: position of the first sample in the training order.
        size: samples of a micro-batch.
        stride: distance between this rank's consecutive micro-batches in the training order, in samples.
        seed: seed of the reshuffling of each epoch; None reads the dataset once, in its own order.
        pin: put batches into pinned memory.

    Raises:
        DataError: if the dataset has no samples, or no more for another micro-batch.
    """
    epoch, order = -1, np.empty(0, dtype=np.int64)
    total = len(dataset)
    if total == 0:
        raise DataError("the dataset has no samples")
    while seed is not None or first + size <= total:
        sample_ids = range(first, first + size)
        indices: list[int] = []
        for sample_id in sample_ids:
            # A micro-batch may span two epochs.
            if seed is not None and sample_id // total != epoch:
                epoch = sample_id // total
                order = epoch_order(seed, epoch, total)
            indices.append(sample_id if seed is None else int(order[sample_id % total]))
        batch = collate(dataset, indices, sample_ids)
        yield batch.pin() if pin else batch
        first += stride
    raise DataError(f"out of data: the dataset has {total} samples")


def epoch_order(seed: int, epoch: int, total: int) -> NDArray[np.int64]:
    """Return the order of a cyclic loader in one epoch, int64 `[total]`.

    Args:
        seed: the run's seed.
        epoch: number of the epoch, from 0.
        total: number of samples in the dataset.
    """
    return np.random.default_rng([seed, epoch]).permutation(total)


class ReadAhead:
    """Reads up to `depth` items of an iterator ahead, in a thread; `get` raises its exceptions."""

    def __init__(self, source: Iterator[Batch], depth: int) -> None:
        self._items: queue.Queue[Batch | Exception] = queue.Queue(maxsize=depth)
        self._stopped = threading.Event()
        # The thread has references to the queue and the event only, so that this object can be garbage-collected.
        args = (source, self._items, self._stopped)
        self._thread = threading.Thread(target=fill_queue, args=args, name="read-ahead", daemon=True)
        self._thread.start()

    def get(self) -> Batch:
        """Return the next item, or raise the exception that the iterator raised."""
        if self._stopped.is_set():
            raise ValueError("the loader is closed")
        item = self._items.get()
        if isinstance(item, Exception):
            raise item
        return item

    def stop(self) -> None:
        """End the thread, and wait up to 5 s for it, since a thread inside torch must not outlive the interpreter."""
        self._stopped.set()
        with suppress(queue.Empty):
            self._items.get_nowait()  # unblocks a thread that waits because the queue is full
        if self._thread is not threading.current_thread():
            self._thread.join(timeout=5.0)


def fill_queue(source: Iterator[Batch], items: queue.Queue[Batch | Exception], stopped: threading.Event) -> None:
    """Move items from a source to a queue until the source ends or `stopped` is set.

    Args:
        source: iterator of micro-batches.
        items: the queue for the micro-batches, and for the exception that ends the source.
        stopped: set when no more items are needed.
    """

    def put(item: Batch | Exception) -> None:
        while not stopped.is_set():
            try:
                items.put(item, timeout=0.2)  # with a timeout, to notice that the loader was closed
                return
            except queue.Full:
                continue

    try:
        for batch in source:
            put(batch)
            if stopped.is_set():
                return
    except Exception as error:  # raised again by `get`
        put(error)
