"""One training step: the only place where data, pipeline and optimizer meet."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from megatron.config.schema import BatchConfig
from megatron.contract import Batch, Loss
from megatron.mesh.mesh import Mesh
from megatron.mesh.watch import Watch
from megatron.optim.lr import Schedule
from megatron.optim.optimizer import Optimizer
from megatron.optim.scaler import Scaler
from megatron.parallel.collectives import all_reduce
from megatron.parallel.random import derive_seed
from megatron.pipeline.executor import Executor, StepOutput
from megatron.train.nonfinite import NonFinite, investigate
from megatron.train.report import StepReport
from megatron.train.state import TrainState


def objective(batch: BatchConfig, seq_length: int, dp: int, scaler: Scaler) -> Callable[[Loss, int], Tensor]:
    """Micro-batch loss -> what is differentiated, given the number of micro-batches of the step; times the loss scale.

    token: the mean over all tokens of the global batch that count. How many do is known only when all ranks have seen
    their data, so the sum is divided by how many there can be, and `train_step` corrects the gradients by the ratio;
    it is 1 unless the data masks some. micro-batch: the mean of the micro-batches' means.
    """
    micro_batch_size = batch.micro_batch_size or 1

    def of_tokens(loss: Loss, micro_batches: int) -> Tensor:
        return loss.sum * (scaler.scale / (micro_batches * micro_batch_size * dp * seq_length))

    def of_micro_batches(loss: Loss, micro_batches: int) -> Tensor:
        return loss.sum / loss.tokens.clamp(min=1.0) * (scaler.scale / (micro_batches * dp))

    return of_tokens if batch.loss_average == "token" else of_micro_batches


class Step:
    """Bound to the parts it joins; `__call__` is the step.

    torch_random: the device whose own generator draws numbers, with --fused-attention-dropout; else None.
    """

    def __init__(
        self,
        pipeline: Executor,
        optimizer: Optimizer,
        schedule: Schedule,
        mesh: Mesh,
        batch: BatchConfig,
        seq_length: int,
        watch: Watch,
    ) -> None:
        self.pipeline, self.optimizer, self.schedule, self.mesh = pipeline, optimizer, schedule, mesh
        self.batch, self.seq_length, self.watch = batch, seq_length, watch
        self.torch_random: torch.device | None = None

    def __call__(self, batches: Sequence[Batch], state: TrainState) -> StepReport:
        """Forward, backward and update over this rank's micro-batches of the step. Collective."""
        self.optimizer.zero(len(batches))
        with self._seeded(state.iteration):
            output = self.pipeline.step(batches)
        self.watch.doing("the optimizer's step")
        loss, tokens, means = totals(output, self.mesh)
        samples = sum(b.tokens.shape[0] for b in batches) * self.mesh.dp.size
        possible = samples * self.seq_length
        by_token = self.batch.loss_average == "token"
        mean = loss / max(tokens, 1.0) if by_token else means / (len(batches) * self.mesh.dp.size)
        correction = possible / tokens if by_token and tokens > 0 else 1.0
        update = self.optimizer.step(
            lr=self.schedule.rate(state.scheduled_samples),
            weight_decay=self.schedule.weight_decay(state.scheduled_samples),
            scale=correction / state.scaler.scale,
        )
        nonfinite = None
        if update.skipped or not math.isfinite(mean):
            nonfinite = self._investigate(batches, output, state.iteration, skipped=update.skipped)
        state.scaler.update(not update.skipped)
        self.watch.idle()
        return StepReport(
            lm_loss=mean,
            grad_norm=update.grad_norm,
            skipped=update.skipped,
            nan=math.isnan(mean),
            samples=samples,
            tokens=possible,
            zeros=update.zeros,
            params_norm=update.params_norm,
            nonfinite=nonfinite,
        )

    def _investigate(self, batches: Sequence[Batch], output: StepOutput, iteration: int, *, skipped: bool) -> NonFinite | None:
        """What was not finite. Collective. The loss scale is still the step's."""
        self.watch.doing("looking for what was not finite")
        with self._seeded(iteration):
            return investigate(self.pipeline, self.mesh, self.optimizer.zero, batches, output, skipped=skipped)

    @contextmanager
    def _seeded(self, iteration: int) -> Iterator[None]:
        """A kernel that draws its own numbers draws the same ones in a resumed run, and others on every rank."""
        device, mesh = self.torch_random, self.mesh
        if device is None:
            yield
            return
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(derive_seed(self.batch.seed, "kernel", iteration, mesh.dp.rank, mesh.tp.rank, mesh.pp.rank))
            yield


def totals(output: StepOutput, mesh: Mesh) -> tuple[float, float, float]:
    """Loss sum, token count and sum of means over all data-parallel ranks and stages, on every rank."""
    local = torch.stack([output.loss, output.tokens, output.means])
    for axis in (mesh.dp_cp, mesh.pp):
        local = all_reduce(local, axis)
    loss, tokens, means = local.tolist()
    return loss, tokens, means
