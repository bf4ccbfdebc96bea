"""Learning rate and weight decay as functions of the number of trained samples. Pure.

Everything is counted in samples, as in Megatron-LM: a step adds its global batch size, so the schedule is independent of a
batch size ramp-up. An update uses the rate at the samples trained before it, so the first update of a warm-up has the
warm-up's initial rate.
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
    """Learning rate and weight decay at each number of trained samples.

    peak, floor: highest and lowest learning rate. style: shape of the decay. warmup, decay: samples at which the warm-up and
    the decay end, counted from the start of the run. decay_weights_from, _to, _style: first and last weight decay, and the
    shape between them. decay_weights_over: samples over which the weight decay changes. initial: learning rate at the start of
    the warm-up. annealing: for style WSD (warm-up, stable, decay; arXiv 2404.06395), the number of samples before the decay's
    end in which the rate falls; until then it is the peak. annealing_style: shape of that fall. decoupled: the word embedding
    and the output layer have their own peak and floor, decoupled_peak and decoupled_floor.
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

        A length given in steps is converted to the samples of that many steps from the start of the run.
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
            # A fraction of the decay's length, not of the run's, as in Megatron-LM.
            warmup = int(optim.lr_warmup_fraction * decay)
        decoupled_floor = optim.min_lr if optim.decoupled_min_lr is None else optim.decoupled_min_lr
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
            decoupled_floor=0.0 if optim.decoupled_lr is None else decoupled_floor,
        )

    @classmethod
    def from_saved(cls, values: Mapping[str, Any]) -> LRSchedule:
        """Return the schedule saved in a checkpoint. values: its fields by name.

        A checkpoint without `decay_weights_over` gets the length of the learning rate's decay.
        """
        return cls(**{"decay_weights_over": values["decay"], **values})

    def rate(self, samples: int) -> float:
        """Return the learning rate of the update made after `samples` samples."""
        return self._rate(samples, self.peak, self.floor)

    def decoupled_rate(self, samples: int) -> float:
        """Return the learning rate of the word embedding and the output layer for the update made after `samples` samples."""
        return self._rate(samples, self.decoupled_peak, self.decoupled_floor) if self.decoupled else self.rate(samples)

    def _rate(self, samples: int, peak: float, floor: float) -> float:
        if self.warmup > 0 and samples <= self.warmup:
            return self.initial + (peak - self.initial) * samples / self.warmup
        if self.style == "constant":
            return peak
        if samples > self.decay:  # a run may be longer than its decay
            return floor
        if self.style == "inverse-square-root":
            return max(floor, peak * math.sqrt(max(self.warmup, 1)) / math.sqrt(max(samples, 1)))
        if self.style == "WSD":  # warm-up, stable, decay
            start = self.decay - self.annealing
            remaining = 1.0 if samples <= start else _falling(self.annealing_style, (samples - start) / self.annealing)
        else:
            remaining = _falling(self.style, (samples - self.warmup) / max(1, self.decay - self.warmup))
        return floor + remaining * (peak - floor)

    def weight_decay(self, samples: int) -> float:
        """Return the weight decay of the update made after `samples` samples."""
        if self.decay_weights_style == "constant" or samples >= self.decay_weights_over:
            return self.decay_weights_to
        difference = self.decay_weights_to - self.decay_weights_from
        return self.decay_weights_from + _rising(self.decay_weights_style, samples / self.decay_weights_over) * difference


def _rising(style: str, t: float) -> float:
    """Return a function of t that rises from 0 at t = 0 to 1 at t = 1: a line or half a cosine."""
    return t if style == "linear" else 0.5 * (1.0 - math.cos(math.pi * t))


def _falling(style: str, t: float) -> float:
    """Return a function of t that falls from 1 at t = 0 to 0 at t = 1."""
    if style == "exponential":  # 0.5^t falls from 1 to 0.5, which is scaled and shifted to end at 0
        return 2.0 * math.pow(0.5, t) - 1.0
    if style == "minus_sqrt":
        return 1.0 - math.sqrt(t)
    return 1.0 - _rising(style, t)
