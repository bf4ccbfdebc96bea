"""Define the values of a step, a log line and an evaluation that sinks receive; compute FLOPs for them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from megatron.config.schema import RunConfig
from megatron.plan.flops import causal_flops_per_token, flops_per_token
from megatron.plan.size import MetaModel
from megatron.train.nonfinite import NonFinite

# Peak dense bf16 TFLOP/s from NVIDIA's data sheets, by a part of the device's name; the longest part that matches is used.
PEAKS = {
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "A100": 312.0,
    "A800": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "A10": 125.0,
    "V100": 125.0,
    "B200": 2250.0,
}


@dataclass(frozen=True)
class StepReport:
    """Result of one step.

    Attributes:
        lm_loss: mean language-model loss over the global batch; 0 if all tokens are masked.
        grad_norm: L2 norm of the whole gradient, before clipping.
        skipped: the weights were not updated.
        nan: the loss was NaN.
        samples: number of samples in the global batch.
        tokens: number of tokens in the global batch, masked ones included.
        zeros: number of zeros in the gradient; None if they are not counted.
        params_norm: L2 norm of the parameters; None if it is not computed.
        left_out: --skip-train-iterations names the step, so its samples were read, but not trained on.
        nonfinite: the first value that was not finite; None if all were, or none was found.
        sop_loss: mean sentence-order loss of the samples; None for a model without a binary head.
    """

    lm_loss: float
    grad_norm: float
    skipped: bool
    nan: bool
    samples: int
    tokens: int
    zeros: int | None = None
    params_norm: float | None = None
    left_out: bool = False
    nonfinite: NonFinite | None = None
    sop_loss: float | None = None


@dataclass(frozen=True)
class Metrics:
    """Values of one step, or of one log line, which averages over the steps since the last line. None means unknown.

    The fields are the keys of a line of `metrics.jsonl`. tflops_per_gpu and mfu count attention between all pairs of
    positions, mfu_causal only the causal half of them; see `plan/flops.py`. extra contains the metrics of hooks, by name.
    """

    iteration: int
    lm_loss: float | None
    sop_loss: float | None
    grad_norm: float | None
    learning_rate: float
    loss_scale: float
    skipped_iterations: int
    nan_iterations: int
    consumed_samples: int
    consumed_tokens: int
    iteration_time_ms: float | None
    tokens_per_second: float | None
    tflops_per_gpu: float | None
    mfu: float | None
    mfu_causal: float | None
    peak_memory_bytes: int | None
    extra: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class LogContext:
    """Values that sinks show beside the metrics of a step or a log line."""

    global_batch_size: int
    train_iters: int
    world_size: int
    zeros: int | None
    params_norm: float | None
    eta_seconds: float | None
    skipped_samples: int = 0
    decoupled_lr: float | None = None


@dataclass(frozen=True)
class Evaluation:
    """Mean losses of one evaluation: lm_loss over tokens, sop_loss over samples."""

    iteration: int
    split: str
    lm_loss: float
    consumed_samples: int
    sop_loss: float | None = None

    @property
    def ppl(self) -> float:
        """The perplexity; infinite if it is too large for a float."""
        try:
            return math.exp(self.lm_loss)
        except OverflowError:
            return math.inf


def peak_tflops(device: torch.device, override: float | None) -> float | None:
    """Return the peak dense bf16 TFLOP/s of a device: `override`, else by the device's name; None if unknown."""
    if override is not None or device.type != "cuda":
        return override
    name = torch.cuda.get_device_name(device)
    # Longer parts first, since `H100` is also a part of `H100 PCIe`.
    matches = [peak for part, peak in sorted(PEAKS.items(), key=lambda item: -len(item[0])) if part in name]
    return matches[0] if matches else None


def sample_flops(config: RunConfig) -> float:
    """Return the FLOPs of training on one sample, with all its rows: a multiple-choice sample has several."""
    seq_length = config.data.seq_length
    return float(flops_per_token(MetaModel(config.model), seq_length) * seq_length * config.model.rows_per_sample)


def causal_share(config: RunConfig) -> float | None:
    """Return the ratio of FLOPs that count only the causal half of attention to `sample_flops`; None for BERT."""
    model, seq_length = MetaModel(config.model), config.data.seq_length
    causal = causal_flops_per_token(model, seq_length)
    return None if causal is None else causal / flops_per_token(model, seq_length)
