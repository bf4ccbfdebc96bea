"""How large the global batch is, and when: the arithmetic of micro-batches and of batch sizes that change. Pure.

With `--rampup-batch-size START INCREMENT SAMPLES` the global batch begins with START samples and grows by INCREMENT in
equal portions of SAMPLES until it reaches `--global-batch-size`. With `--step-batch-size-schedule "0:SIZE TOKENS:SIZE ..."`
it has each SIZE from so many trained tokens on. Its size is a function of the samples consumed so far, so a resumed run
needs no other state. The arithmetic is Megatron-LM's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from decimal import Decimal
from itertools import pairwise

from megatron.config.schema import BatchConfig

SUFFIXES = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
NUMBER = re.compile(r"(\d{1,30}(?:\.\d{0,30})?(?:e\+?\d\d?)?)([kmbt]?)", re.IGNORECASE | re.ASCII)
Steps = tuple[tuple[int, int], ...]  # (samples consumed before, global batch size from there on)


def parse_steps(words: Sequence[str], seq_length: int) -> Steps:
    """The steps of a --step-batch-size-schedule, by samples.

    Args:
        words: TOKENS:SIZE, one or several in a word, between them blanks or commas; each number with an optional K, M, B or T.
        seq_length: tokens of a sample.

    Returns:
        In order, the samples after which each size begins, and the size.

    Raises:
        ValueError: saying what is wrong.
    """
    steps: list[tuple[int, int]] = []
    for entry in " ".join(words).replace(",", " ").split():
        tokens, size = (_number(part) for part in entry.split(":")) if entry.count(":") == 1 else (None, None)
        if tokens is None or size is None:
            raise ValueError(f"has the entry {entry}, which is not TOKENS:SIZE, such as 0:768 or 250B:1536")
        if size != int(size) or not 0 < size <= 1 << 20:
            raise ValueError(f"has the size {entry.split(':')[1]}, which is not a whole number from 1 to 1,048,576")
        steps.append((int(tokens) // seq_length, int(size)))
    steps.sort(key=lambda step: step[0])
    if not steps or steps[0][0] != 0:
        raise ValueError("does not say the size at the begin; its first entry is 0:SIZE")
    for (before, _), (after, _) in pairwise(steps):
        if before == after:
            raise ValueError(f"has two sizes from sample {before} on (tokens / `--seq-length {seq_length}`, rounded down)")
    return tuple(steps)


def _number(text: str) -> Decimal | None:
    """A number with its suffix multiplied out; None where it is none."""
    found = NUMBER.fullmatch(text)
    return None if found is None else Decimal(found[1]) * SUFFIXES[found[2].lower()]


def global_batch_size_at(batch: BatchConfig, consumed_samples: int) -> int:
    """Samples of the step that follows `consumed_samples`. ValueError while the global batch size is open."""
    return _shared(batch, _wanted_at(batch, consumed_samples))


def full_batch_size(batch: BatchConfig) -> int:
    """Samples of a step when the batch size changes no more, and of an evaluation's."""
    return _shared(batch, _full(batch))


def _wanted_at(batch: BatchConfig, consumed_samples: int) -> int:
    full = _full(batch)
    if batch.batch_size_steps:
        return next(size for begin, size in reversed(_steps(batch)) if consumed_samples >= begin)
    if not batch.rampup_batch_size:
        return full
    start, increment, samples = batch.rampup_batch_size
    steps = (full - start) // increment
    if steps == 0 or consumed_samples > samples:
        return full
    return min(full, start + int(consumed_samples / (samples / steps)) * increment) if samples else full


def micro_batch_count(batch: BatchConfig, dp: int, consumed_samples: int) -> int:
    """Micro-batches of each rank in the step that follows `consumed_samples`, with `dp` data-parallel ranks."""
    return global_batch_size_at(batch, consumed_samples) // (_micro(batch) * dp)


def ramp_sizes(batch: BatchConfig) -> list[int]:
    """Every global batch size that the run passes through, in order."""
    full = _full(batch)
    if batch.batch_size_steps:
        return [size for _, size in _steps(batch)]
    if not batch.rampup_batch_size:
        return [_shared(batch, full)]
    start, increment, _ = batch.rampup_batch_size
    return [_shared(batch, size) for size in range(start, full + 1, increment)]


def stretches(batch: BatchConfig, consumed: int = 0) -> Iterator[tuple[int | None, int]]:
    """(steps, global batch size) of the run from `consumed` samples on, where steps follow that have one size.

    The steps of the last stretch are None: it goes on for ever. Steps of a ramp-up are stretches of their own.
    """
    if batch.batch_size_steps:
        for (_, size), (end, _) in pairwise(_steps(batch)):
            if consumed < end:
                steps = -(-(end - consumed) // size)
                consumed += steps * size
                yield steps, size
    elif batch.rampup_batch_size:
        while consumed <= batch.rampup_batch_size[2]:
            size = global_batch_size_at(batch, consumed)
            consumed += size
            yield 1, size
    yield None, full_batch_size(batch)


def iterations_for(batch: BatchConfig, samples: int) -> int:
    """Steps that `samples` samples make; a last part batch is dropped. A batch that had to be decreased counts as it was."""
    iterations = 0
    for steps, size in stretches(replace(batch, batch_multiple=1)):
        whole = samples // size
        if steps is None or whole < steps:
            return iterations + whole
        iterations, samples = iterations + steps, samples - steps * size
    return iterations


def samples_for(batch: BatchConfig, iterations: int) -> int:
    """Samples that the first `iterations` steps take. A batch that had to be decreased counts as it was.

    So a run's lengths stay the same on any number of ranks.
    """
    samples = 0
    for steps, size in stretches(replace(batch, batch_multiple=1)):
        taken = iterations if steps is None else min(steps, iterations)
        iterations, samples = iterations - taken, samples + taken * size
        if not iterations:
            break
    return samples


def _steps(batch: BatchConfig) -> Steps:
    """The pairs of `BatchConfig.batch_size_steps`."""
    numbers = batch.batch_size_steps
    return tuple(zip(numbers[::2], numbers[1::2], strict=True))


def _shared(batch: BatchConfig, size: int) -> int:
    """A global batch size, decreased to what the ranks can share where that is asked for."""
    return size - size % batch.batch_multiple


def _full(batch: BatchConfig) -> int:
    if batch.global_batch_size is None:
        raise ValueError("BatchConfig.global_batch_size is not resolved yet")
    return batch.global_batch_size


def _micro(batch: BatchConfig) -> int:
    if batch.micro_batch_size is None:
        raise ValueError("BatchConfig.micro_batch_size is not given")
    return batch.micro_batch_size
