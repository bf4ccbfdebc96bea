"""One training step: forward and backward passes over the micro-batches, then the update of the weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from megatron.config.schema import BatchConfig
from megatron.contract import Batch, Loss
from megatron.launch.watchdog import Watchdog
from megatron.mesh.mesh import Axis, Mesh
from megatron.optim.lr import LRSchedule
from megatron.optim.optimizer import Optimizer
from megatron.optim.scaler import Scaler
from megatron.parallel.collectives import all_reduce
from megatron.parallel.random import derive_seed
from megatron.pipeline.executor import Executor, StepOutput
from megatron.train.nonfinite import NonFinite, investigate
from megatron.train.report import StepReport
from megatron.train.state import TrainState


class ScaledLoss:
    """Turns the loss of a micro-batch into the scalar that is differentiated, multiplied by the loss scale.

    With --loss-average token, the sum over micro-batches and ranks is the mean over all unmasked tokens of the global batch;
    with micro-batch, it is the mean of the micro-batches' means. For a BERT with a binary head, the mean sentence-order loss
    over the samples is added.

    Args:
        batch: contains the sizes of batches, and the kind of average.
        seq_length: tokens per sample.
        dp: the data-parallel axis.
        scaler: contains the loss scale.
        masked: the data may mask tokens, so the unmasked ones must be counted before each step.
        binary: the model has a binary head.
        device: the device of collectives.
    """

    def __init__(
        self,
        batch: BatchConfig,
        seq_length: int,
        dp: Axis,
        scaler: Scaler,
        *,
        masked: bool = False,
        binary: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        self.by_token = batch.loss_average == "token"
        self.micro_batch_size, self.seq_length = batch.micro_batch_size, seq_length
        self.dp, self.scaler, self.masked, self.binary, self.device = dp, scaler, masked, binary, device
        self.tokens = 0.0

    def count(self, batches: Sequence[Batch]) -> None:
        """Count the unmasked tokens of the global batch. Collective over dp if the data may mask some."""
        if not self.masked or not self.by_token:
            self.tokens = float(len(batches) * self.micro_batch_size * self.dp.size * self.seq_length)
            return
        counted = torch.stack([batch.loss_mask.sum() for batch in batches]).sum()  # loss_mask: [micro_batch, seq]
        self.tokens = max(1.0, float(all_reduce(counted.to(self.device), self.dp)))

    def __call__(self, loss: Loss, micro_batches: int) -> Tensor:
        # Gradients are summed over micro-batches and dp, so the loss of each micro-batch is divided by the global count.
        if self.by_token:
            scaled = loss.sum * (self.scaler.scale / self.tokens)
        else:
            scaled = loss.sum / loss.tokens.clamp(min=1.0) * (self.scaler.scale / (micro_batches * self.dp.size))
        if loss.order is None:
            return scaled
        return scaled + loss.order * (self.scaler.scale / (micro_batches * self.micro_batch_size * self.dp.size))


class Step:
    """One training step: forward and backward passes over the micro-batches, then the update.

    Args:
        scaled_loss: the loss that is differentiated.
        pipeline: runs the forward and backward passes.
        optimizer: reduces the gradients and updates the parameters.
        schedule: learning rate and weight decay as functions of the samples so far.
        mesh: the parallel axes.
        batch: contains the sizes of batches, and the seed.
        watch: the watchdog, to which each phase of the step is reported.
        torch_random: the device whose torch generator draws dropout, with --fused-attention-dropout; else None.
    """

    def __init__(
        self,
        scaled_loss: ScaledLoss,
        pipeline: Executor,
        optimizer: Optimizer,
        *,
        schedule: LRSchedule,
        mesh: Mesh,
        batch: BatchConfig,
        watch: Watchdog,
        torch_random: torch.device | None = None,
    ) -> None:
        self.scaled_loss, self.pipeline, self.optimizer = scaled_loss, pipeline, optimizer
        self.schedule, self.mesh, self.batch = schedule, mesh, batch
        self.watch, self.torch_random = watch, torch_random

    def __call__(self, batches: Sequence[Batch], state: TrainState) -> StepReport:
        """Run forward, backward and update over this rank's micro-batches of the step. Collective."""
        self.optimizer.zero(len(batches))
        self.watch.waiting("the other ranks' count of tokens")
        self.scaled_loss.count(batches)
        with self._seeded(state.iteration):
            output = self.pipeline.step(batches)
        self.watch.doing("the optimizer's step")
        loss, unmasked, means, order = reduce_losses(output, self.mesh)
        # Rows of the batches are not samples, since a sample of a multiple-choice task has several rows.
        samples = len(batches) * self.batch.micro_batch_size * self.mesh.dp.size
        token_count = sum(b.tokens.numel() for b in batches) * self.mesh.dp.size
        mean = loss / max(unmasked, 1.0) if self.scaled_loss.by_token else means / (len(batches) * self.mesh.dp.size)
        update = self.optimizer.step(
            lr=self.schedule.rate(state.scheduled_samples),
            weight_decay=self.schedule.weight_decay(state.scheduled_samples),
            decoupled_lr=self.schedule.decoupled_rate(state.scheduled_samples),
            scale=1.0 / state.scaler.scale,
        )
        nonfinite = None
        # Search before the loss scale is updated, since the search repeats the step with the scale that it failed with.
        if update.skipped or not math.isfinite(mean + order):
            nonfinite = self._investigate(batches, output, state.iteration, skipped=update.skipped)
        state.scaler.update(not update.skipped)
        self.watch.idle()
        return StepReport(
            lm_loss=mean,
            sop_loss=order / samples if self.scaled_loss.binary else None,
            grad_norm=update.grad_norm,
            skipped=update.skipped,
            nan=math.isnan(mean),
            samples=samples,
            tokens=token_count,
            zeros=update.zeros,
            params_norm=update.params_norm,
            nonfinite=nonfinite,
        )

    def _investigate(self, batches: Sequence[Batch], output: StepOutput, iteration: int, *, skipped: bool) -> NonFinite | None:
        """Find the first value that was not finite. Collective. Call it before the loss scale is updated."""
        self.watch.doing("looking for what was not finite")
        with self._seeded(iteration):
            return investigate(self.pipeline, self.mesh, self.optimizer.zero, batches, output, skipped=skipped)

    @contextmanager
    def _seeded(self, iteration: int) -> Iterator[None]:
        """Seed torch's generator from the iteration and this rank inside the block.

        A kernel that draws from the generator then draws the same numbers in a resumed run, and different ones on each rank.
        """
        device, mesh = self.torch_random, self.mesh
        if device is None:
            yield
            return
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(derive_seed(self.batch.seed, "kernel", iteration, mesh.dp.rank, mesh.tp.rank, mesh.pp.rank))
            yield


def reduce_losses(output: StepOutput, mesh: Mesh) -> tuple[float, float, float, float]:
    """Return the fields of `StepOutput`, summed over data- and context-parallel ranks and stages, on every rank. Collective."""
    local = torch.stack([output.loss, output.tokens, output.means, output.order])  # [4]
    # Only the last stage has a loss; the others add zeros. All tensor-parallel ranks have the same values, so tp is not summed.
    for axis in (mesh.dp_cp, mesh.pp):
        local = all_reduce(local, axis)
    loss, tokens, means, order = local.tolist()
    return loss, tokens, means, order
