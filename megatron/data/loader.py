"""Load the micro-batches of one data-parallel rank, in order.

The whole state is one integer, the number of samples that all ranks together have consumed. Sample number n of the training
order is therefore the same for every layout. With d data-parallel ranks and micro-batches of b samples, micro-batch j of
rank r holds the samples from `consumed + (j * d + r) * b` on. Blocks of d * b samples do not depend on the global batch
size, so it may change from step to step while batches are read ahead.
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
        collate: called with the dataset, the numbers of the samples in it, and their numbers in the training order
            (`GPTCollator`).
        dp_rank: this rank's place along the data-parallel axis.
        dp_size: size of that axis.
        micro_batch_size: samples of a micro-batch.
        consumed: samples that all ranks have had already.
        read_ahead: micro-batches that a thread prepares before they are asked for; 0 prepares them on request.
        cyclic: reshuffle the dataset for each epoch and never run out; otherwise samples come in its order, once.
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
        self.block = dp_size * micro_batch_size  # samples of one micro-batch of each rank
        first = consumed + dp_rank * micro_batch_size
        self._source = iter_micro_batches(
            dataset, collate, first, micro_batch_size, self.block, seed=seed if cyclic else None, pin=pin_memory
        )
        self._ahead = ReadAhead(self._source, read_ahead) if read_ahead > 0 else None
        self._failure: Exception | None = None
        if self._ahead is not None:  # stops the thread of a loader that is garbage-collected without `close`
            weakref.finalize(self, self._ahead.stop)

    def next_batches(self, global_batch_size: int) -> list[Batch]:
        """Return this rank's micro-batches of one step that takes `global_batch_size` samples over all ranks.

        Raises:
            ValueError: if that is no multiple of micro-batch x data-parallel size.
            DataError: when the dataset has not so many samples left or holds a wrong token; `consumed` stays as it was.
        """
        if global_batch_size < 1 or global_batch_size % self.block:
            raise ValueError(f"global batch {global_batch_size}: no multiple of micro-batch x data-parallel size, {self.block}")
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
            self._failure = error  # the source has ended with it, and the next call must not find it empty
            raise
        self.consumed += global_batch_size
        return batches

    def close(self) -> None:
        """Stop reading ahead. Not needed, but it frees the thread at once."""
        if self._ahead is not None:
            self._ahead.stop()


def iter_micro_batches(
    dataset: SampleSource, collate: Collate, first: int, size: int, stride: int, *, seed: int | None, pin: bool
) -> Iterator[Batch]:
    """Yield one rank's micro-batches.

    Args:
        dataset: the samples.
        collate: makes a micro-batch of samples.
        first: number of the first sample in the training order.
        size: samples of a micro-batch.
        stride: samples from one micro-batch of this rank to the next: those of all ranks.
        seed: seed of the reshuffling of each epoch; None for the dataset's own order, once.
        pin: put batches into pinned memory.

    Raises:
        DataError: when the dataset has no samples, or none left.
    """
    epoch, order = -1, np.empty(0, dtype=np.int64)
    total = len(dataset)
    if total == 0:
        raise DataError("the dataset has no samples")
    while seed is not None or first + size <= total:
        sample_ids = range(first, first + size)
        indices: list[int] = []
        for sample_id in sample_ids:
            # A micro-batch may reach from one epoch into the next.
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
    """Reads an iterator ahead in a thread, by up to `depth` items; `get` raises its exceptions."""

    def __init__(self, source: Iterator[Batch], depth: int) -> None:
        self._items: queue.Queue[Batch | Exception] = queue.Queue(maxsize=depth)
        self._stopped = threading.Event()
        # The thread has references to the queue and the event only, so that this object can be garbage-collected.
        args = (source, self._items, self._stopped)
        self._thread = threading.Thread(target=fill_queue, args=args, name="read-ahead", daemon=True)
        self._thread.start()

    def get(self) -> Batch:
        """Return the next item; raises the exception that the iterator raised in its place."""
        if self._stopped.is_set():
            raise ValueError("the loader is closed")
        item = self._items.get()
        if isinstance(item, Exception):
            raise item
        return item

    def stop(self) -> None:
        """End the thread, and wait for it, since a thread inside torch must not outlive the interpreter."""
        self._stopped.set()
        with suppress(queue.Empty):
            self._items.get_nowait()  # wakes a thread that waits because the queue is full
        if self._thread is not threading.current_thread():
            self._thread.join(timeout=5.0)


def fill_queue(source: Iterator[Batch], items: queue.Queue[Batch | Exception], stopped: threading.Event) -> None:
    """Move items from a source to a queue until the source ends or `stopped` is set.

    Args:
        source: iterator of micro-batches.
        items: receives them, and the exception that ends the source.
        stopped: set when no more items are needed.
    """

    def put(item: Batch | Exception) -> None:
        while not stopped.is_set():
            try:
                items.put(item, timeout=0.2)  # a full queue must not hide that the loader was closed
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
