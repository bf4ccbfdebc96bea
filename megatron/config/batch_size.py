"""How large the global batch is, and when: the arithmetic of micro-batches and of batch-size ramp-up. Pure.

With `--rampup-batch-size START INCREMENT SAMPLES` the global batch begins with START samples and grows by INCREMENT in
equal portions of SAMPLES until it reaches `--global-batch-size`. Its size is a function of the samples consumed so far,
so a resumed run needs no other state. The arithmetic is Megatron-LM's.
"""

from __future__ import annotations

from megatron.config.schema import BatchConfig


def global_batch_size_at(batch: BatchConfig, consumed_samples: int) -> int:
    """Samples of the step that follows `consumed_samples`. ValueError while the global batch size is open."""
    full = _full(batch)
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
    if not batch.rampup_batch_size:
        return [full]
    start, increment, _ = batch.rampup_batch_size
    return list(range(start, full + 1, increment))


def iterations_for(batch: BatchConfig, samples: int) -> int:
    """Steps that `samples` samples make: the ramp step by step, the rest in full batches; a last part batch is dropped."""
    consumed = iterations = 0
    if batch.rampup_batch_size:
        while consumed <= batch.rampup_batch_size[2]:
            consumed += global_batch_size_at(batch, consumed)
            iterations += 1
    return iterations + (samples - consumed) // _full(batch)


def _full(batch: BatchConfig) -> int:
    if batch.global_batch_size is None:
        raise ValueError("BatchConfig.global_batch_size is not resolved yet")
    return batch.global_batch_size


def _micro(batch: BatchConfig) -> int:
    if batch.micro_batch_size is None:
        raise ValueError("BatchConfig.micro_batch_size is not given")
    return batch.micro_batch_size
