"""Learning rate and weight decay as functions of the samples trained. Pure.

Everything is counted in samples, as in Megatron-LM: a step of the run adds its global batch size, so a ramp-up of the
batch size stretches nothing. The rate used by an update is the one before it, so a warm-up's first update has the rate
that the warm-up begins with.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron.config.batch import samples_for
from megatron.config.schema import BatchConfig, OptimConfig


@dataclass(frozen=True)
class LRSchedule:
    """Learning rate and weight decay at each number of samples trained.

    peak, floor: learning rates. warmup, decay: lengths in samples; the decay is measured from the start of the run.
    decay_weights_over: samples over which the weight decay goes from its first value to its last. initial: learning rate at
    the begin of the warm-up. annealing: of WSD (warm-up, stable, decay; arXiv 2404.06395), the samples at the decay's end in
    which the rate falls; before them it is the peak. annealing_style: the shape of that fall. decoupled: whether the word
    embedding and the output layer have a peak and a floor of their own.
    """

    peak: float
    floor: float
    style: str
    warmup: int
    decay: int
    decay_weights_from: float
    decay_weights_to: float
    decay_weights_style: str
    decay_weights_over: int = 0
    initial: float = 0.0
    annealing: int = 0
    annealing_style: str = "exponential"
    decoupled: bool = False
    decoupled_peak: float = 0.0
    decoupled_floor: float = 0.0

    @classmethod
    def from_config(cls, optim: OptimConfig, batch: BatchConfig) -> LRSchedule:
        """Return the schedule of a resolved configuration.

        Lengths given in steps are the samples of so many steps from the run's begin on.
        """
        if batch.train_samples is not None:
            length = batch.train_samples
            decay = optim.lr_decay_samples or length
            warmup, annealing = optim.lr_warmup_samples, optim.lr_wsd_decay_samples or 0
        else:
            length = samples_for(batch, batch.iterations)
            end = optim.lr_decay_iters or batch.iterations
            decay, warmup = samples_for(batch, end), samples_for(batch, optim.lr_warmup_iters)
            annealing = decay - samples_for(batch, max(0, end - (optim.lr_wsd_decay_iters or 0)))
        if optim.lr_warmup_fraction is not None:
            # Of the decay's length, not of the run's, as in Megatron-LM.
            warmup = int(optim.lr_warmup_fraction * decay)
        own_floor = optim.min_lr if optim.decoupled_min_lr is None else optim.decoupled_min_lr
        return cls(
            peak=optim.lr or 0.0,
            floor=optim.min_lr,
            style=optim.lr_decay_style,
            warmup=warmup,
            decay=decay,
            decay_weights_from=optim.start_weight_decay,
            decay_weights_to=optim.end_weight_decay,
            decay_weights_style=optim.weight_decay_incr_style,
            decay_weights_over=length,
            initial=optim.lr_warmup_init,
            annealing=annealing if optim.lr_decay_style == "WSD" else 0,
            annealing_style=optim.lr_wsd_decay_style,
            decoupled=optim.decoupled_lr is not None,
            decoupled_peak=optim.decoupled_lr or 0.0,
            decoupled_floor=0.0 if optim.decoupled_lr is None else own_floor,
        )

    @classmethod
    def from_saved(cls, values: Mapping[str, Any]) -> LRSchedule:
        """Return the schedule that a checkpoint holds, from its fields.

        Where it says no more, the weight decay grows as long as the rate falls.
        """
        return cls(**{"decay_weights_over": values["decay"], **values})

    def rate(self, samples: int) -> float:
        """Return the learning rate of the update made after `samples` samples."""
        return self._rate(samples, self.peak, self.floor)

    def decoupled_rate(self, samples: int) -> float:
        """Return the same of the word embedding and the output layer."""
        return self._rate(samples, self.decoupled_peak, self.decoupled_floor) if self.decoupled else self.rate(samples)

    def _rate(self, samples: int, peak: float, floor: float) -> float:
        if self.warmup > 0 and samples <= self.warmup:
            return self.initial + (peak - self.initial) * samples / self.warmup
        if self.style == "constant":
            return peak
        if samples > self.decay:  # also of a run that goes on for longer than its decay
            return floor
        if self.style == "inverse-square-root":
            return max(floor, peak * math.sqrt(max(self.warmup, 1)) / math.sqrt(max(samples, 1)))
        if self.style == "WSD":  # warm-up, stable, decay
            begin = self.decay - self.annealing
            left = 1.0 if samples <= begin else _remaining_share(self.annealing_style, (samples - begin) / self.annealing)
        else:
            left = _remaining_share(self.style, (samples - self.warmup) / max(1, self.decay - self.warmup))
        return floor + left * (peak - floor)

    def weight_decay(self, samples: int) -> float:
        """Return the weight decay of the update made after `samples` samples."""
        if self.decay_weights_style == "constant" or samples >= self.decay_weights_over:
            return self.decay_weights_to
        gap = self.decay_weights_to - self.decay_weights_from
        return self.decay_weights_from + _elapsed_share(self.decay_weights_style, samples / self.decay_weights_over) * gap


def _elapsed_share(style: str, share: float) -> float:
    """0 -> 1 over a run, in a straight line or half a cosine."""
    return share if style == "linear" else 0.5 * (1.0 - math.cos(math.pi * share))


def _remaining_share(style: str, share: float) -> float:
    """1 -> 0 over a decay: the part of the peak that is left above the floor."""
    if style == "exponential":  # it halves, and is stretched to end at 0
        return 2.0 * math.pow(0.5, share) - 1.0
    if style == "minus_sqrt":
        return 1.0 - math.sqrt(share)
    return 1.0 - _elapsed_share(style, share)
