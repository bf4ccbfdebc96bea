"""Learning rate and weight decay as functions of the samples trained. Pure.

Everything is counted in samples, as in Megatron-LM: a step of the run adds its global batch size, so a ramp-up of the
batch size stretches nothing. The rate used by an update is the one before it, so a warm-up's first update has rate 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron.config.schema import BatchConfig, OptimConfig


@dataclass(frozen=True)
class Schedule:
    """Learning rate and weight decay at each number of samples trained.

    peak, floor: learning rates. warmup, decay: lengths in samples; the decay is measured from the start of the run.
    """

    peak: float
    floor: float
    style: str
    warmup: int
    decay: int
    decay_weights_from: float
    decay_weights_to: float
    decay_weights_style: str

    @classmethod
    def of(cls, optim: OptimConfig, batch: BatchConfig) -> Schedule:
        """From a resolved configuration. Lengths given in steps are multiplied by the global batch size."""
        size = batch.global_batch_size or 1
        if batch.train_samples is not None:
            decay = optim.lr_decay_samples or batch.train_samples
            warmup = optim.lr_warmup_samples
        else:
            decay = (optim.lr_decay_iters or batch.train_iters or 0) * size
            warmup = optim.lr_warmup_iters * size
        if optim.lr_warmup_fraction is not None:
            warmup = int(optim.lr_warmup_fraction * decay)
        constant = optim.weight_decay_incr_style == "constant"
        start = optim.weight_decay if constant or optim.start_weight_decay is None else optim.start_weight_decay
        end = optim.weight_decay if constant or optim.end_weight_decay is None else optim.end_weight_decay
        return cls(
            optim.lr or 0.0, optim.min_lr, optim.lr_decay_style, warmup, decay, start, end, optim.weight_decay_incr_style
        )

    def rate(self, samples: int) -> float:
        """Learning rate of the update made after `samples` samples."""
        if self.warmup > 0 and samples <= self.warmup:
            return self.peak * samples / self.warmup
        if self.style == "constant":
            return self.peak
        if samples > self.decay:
            return self.floor
        if self.style == "inverse-square-root":
            return max(self.floor, self.peak * math.sqrt(max(self.warmup, 1)) / math.sqrt(max(samples, 1)))
        share = (samples - self.warmup) / max(1, self.decay - self.warmup)
        return self.floor + (1.0 - _eased(self.style, share)) * (self.peak - self.floor)

    def weight_decay(self, samples: int) -> float:
        """Weight decay of the update made after `samples` samples."""
        if self.decay_weights_style == "constant" or samples >= self.decay:
            return self.decay_weights_to
        gap = self.decay_weights_to - self.decay_weights_from
        return self.decay_weights_from + _eased(self.decay_weights_style, samples / self.decay) * gap


def _eased(style: str, share: float) -> float:
    """0 -> 1 over a run, in a straight line or half a cosine."""
    return share if style == "linear" else 0.5 * (1.0 - math.cos(math.pi * share))
