"""Build the parts of a run from its configuration: mesh, stages, buffers, optimizer, pipeline and step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import nn

from megatron.config.batch import final_batch_size, samples_for
from megatron.config.schema import ModelConfig, RunConfig
from megatron.contract import Batch
from megatron.launch.job import Job
from megatron.mesh.grid import Grid
from megatron.mesh.mesh import Mesh
from megatron.model.attention import CoreAttention, bidirectional_attention, causal_attention
from megatron.model.build import build_stages
from megatron.model.init import fill_parameters
from megatron.model.transformer import Transformer
from megatron.optim.buffers import FlatBuffer, MainWeights, flat_buffers
from megatron.optim.gather import register_wait_hooks
from megatron.optim.lr import LRSchedule
from megatron.optim.optimizer import Optimizer
from megatron.optim.precision import Precision
from megatron.parallel.recompute import Recompute
from megatron.parallel.ring import RingAttention, shard_batch
from megatron.parallel.spec import Checkpointable, describe, param_spec
from megatron.parallel.tensor_parallel import TensorParallel
from megatron.parallel.weight_grad import WeightGradStore, attach_weight_grad_store, supports_fused_weight_grad
from megatron.pipeline.executor import Executor
from megatron.pipeline.schedules.lower import EARLY
from megatron.pipeline.schedules.schedule import make_schedule, schedule_kind
from megatron.pipeline.transfer import Channels
from megatron.plan.stages import StagePlan, plan_stages
from megatron.train.report import StepReport
from megatron.train.state import TrainState
from megatron.train.step import ScaledLoss, Step


@dataclass
class Run:
    """The parts of a run that a training step needs; see `train.loop.Training` for those that only the loop needs.

    Attributes:
        config: the resolved configuration.
        job: the process group and device of this rank.
        mesh: the parallel axes.
        stages: this rank's pipeline stages, by their number.
        weights: the parameters, as they are saved in checkpoints.
        optimizer: updates the parameters.
        pipeline: runs forward and backward passes.
        step: a `train.step.Step`, or a wrapper around one.
        schedule: learning rate and weight decay as functions of the samples trained on.
        state: the counters that checkpoints save.
    """

    config: RunConfig
    job: Job
    mesh: Mesh
    stages: dict[int, Transformer]
    weights: MainWeights
    optimizer: Optimizer
    pipeline: Executor
    step: Callable[[Sequence[Batch], TrainState], StepReport]
    schedule: LRSchedule
    state: TrainState

    def parts(self, *, optimizer: bool = True, state: bool = True) -> dict[str, Checkpointable]:
        """Return the parts of a checkpoint of the run, by the prefix of their tensors' names."""
        parts: dict[str, Checkpointable] = {"model": self.weights}
        if optimizer:
            parts["optimizer"] = self.optimizer
        if state:
            parts["train"] = self.state
        return parts


def build_run(config: RunConfig, job: Job, *, schedule: LRSchedule | None = None) -> Run:
    """Build mesh, model with its initial weights, optimizer and pipeline, for this rank. Collective.

    Args:
        config: the resolved configuration, with model.vocab_size set.
        job: the process group and device of this rank.
        schedule: the schedule of a resumed run; None to build that of the configuration.
    """
    plan, grid = plan_stages(config), Grid.from_layout(config.layout, job.env.world_size)
    mesh = Mesh.build(grid, job.env.rank, job.timeout, plan.ends, job.watch, config.layout.shared_memory)
    job.watch.waiting("building the model")
    schedule = schedule or LRSchedule.from_config(config.optim, config.batch)
    stages = build_model(config, plan, mesh, job.device)
    buffers = build_buffers(config, stages, mesh, decoupled=schedule.decoupled)
    if config.batch.compile:
        for layer in transformer_layers(stages):
            layer.compile()
    optimizer = build_optimizer(config, stages, mesh, buffers)
    state = TrainState(schedule=asdict(schedule), scaler=Precision.from_config(config.precision).scaler())
    scaled_loss = ScaledLoss(
        config.batch,
        config.data.seq_length,
        mesh.dp,
        state.scaler,
        masked=config.data.eod_mask_loss or config.model.architecture == "bert",
        binary=config.model.has_binary_head,
        device=job.device,
    )
    pipeline = build_pipeline(config, plan, stages, mesh, scaled_loss, job)
    # Only a fused attention kernel draws from torch's generator. `Step` then seeds it, so that a resumed run draws the same.
    torch_random = job.device if kernel_draws_dropout(config.model) else None
    step = Step(
        scaled_loss,
        pipeline,
        optimizer,
        schedule=schedule,
        mesh=mesh,
        batch=config.batch,
        watch=job.watch,
        torch_random=torch_random,
    )
    return Run(
        config=config,
        job=job,
        mesh=mesh,
        stages=stages,
        weights=MainWeights(buffers),
        optimizer=optimizer,
        pipeline=pipeline,
        step=step,
        schedule=schedule,
        state=state,
    )


def build_model(config: RunConfig, plan: StagePlan, mesh: Mesh, device: torch.device) -> dict[int, Transformer]:
    """Build this rank's pipeline stages, with uninitialised parameters.

    Args:
        config: the resolved configuration, with model.vocab_size set.
        plan: the layers and the pipeline rank of each stage.
        mesh: the parallel axes.
        device: the device of the parameters.

    Returns:
        The stages by their number.
    """
    return build_stages(
        config.model,
        plan.placement,
        plan.parts,
        TensorParallel(mesh.tp, config.layout.sequence_parallel),
        mesh.pp.rank,
        seed=config.batch.seed,
        core_attention=choose_core_attention(mesh, causal=config.model.architecture == "gpt", compiled=config.batch.compile),
        recompute=Recompute.from_config(config.memory, mesh.tp, draws=kernel_draws_dropout(config.model)),
        dtype=Precision.from_config(config.precision).compute,
        device=device,
    )


def choose_core_attention(mesh: Mesh, *, causal: bool, compiled: bool) -> CoreAttention:
    """Return the function that computes attention from queries, keys and values in this layout.

    Args:
        mesh: the parallel axes; with context parallelism, keys and values pass around the ring of the cp axis.
        causal: a token attends only to itself and the tokens before it.
        compiled: the layers are compiled; ring attention, which communicates, is then excluded from their graphs.
    """
    if mesh.cp.size == 1:
        return causal_attention if causal else bidirectional_attention
    ring = RingAttention(mesh.cp, causal=causal)
    return torch.compiler.disable(ring.__call__) if compiled else ring  # type: ignore[no-untyped-call]


def kernel_draws_dropout(model: ModelConfig) -> bool:
    """Return whether a fused attention kernel draws dropout masks, from torch's generator."""
    return model.fused_attention_dropout and model.attention_dropout > 0.0


def transformer_layers(stages: Mapping[int, Transformer]) -> list[nn.Module]:
    """Return the transformer layers of all stages."""
    return [layer for stage in stages.values() for layer in stage.layers.values()]


def build_buffers(config: RunConfig, stages: Mapping[int, Transformer], mesh: Mesh, *, decoupled: bool) -> list[FlatBuffer]:
    """Move the parameters into flat buffers, and fill them with their initial values.

    Args:
        config: the resolved configuration.
        stages: this rank's stages, by their number.
        mesh: the parallel axes.
        decoupled: embedding and output layer have a separate learning rate.

    Returns:
        The flat buffers; the parameters of each are reduced and updated in the same way.
    """
    parameters = list(nn.ModuleList(stages.values()).parameters())
    if decoupled:
        for p in parameters:
            describe(p, param_spec(p).with_own_rate())
    buffers = flat_buffers(
        parameters,
        config.layout.ddp_bucket_size,
        mesh,
        sharded=config.layout.use_distributed_optimizer,
        grad_dtype=Precision.from_config(config.precision).gradients,
        optimizer=config.optim.optimizer,
    )
    for buffer in buffers:
        # Drawn in fp32, since `load` stores fp32 main weights, which must not be rounded to the model's dtype.
        specs, values = (param_spec(p) for p in buffer.parameters), buffer.staging_tensor()
        fill_parameters(zip(specs, buffer.views(values), strict=True), config.model, config.batch.seed)
        buffer.load(values)
    return buffers


def build_optimizer(
    config: RunConfig, stages: Mapping[int, Transformer], mesh: Mesh, buffers: Sequence[FlatBuffer]
) -> Optimizer:
    """Build the optimizer. With --overlap-param-gather, add module hooks that wait for the weights of each module.

    Args:
        config: the resolved configuration.
        stages: this rank's stages, by their number.
        mesh: the parallel axes.
        buffers: the parameters, as `build_buffers` returns them.
    """
    layout = config.layout
    optimizer = Optimizer(
        buffers,
        config.optim,
        mesh,
        log_zeros=config.log.log_num_zeros_in_grad,
        log_params_norm=config.log.log_params_norm,
        overlap_grad_reduce=layout.overlap_grad_reduce,
        overlap_param_gather=layout.overlap_param_gather,
    )
    if layout.overlap_param_gather:  # otherwise the optimizer's step itself gathers all weights
        for stage in stages.values():
            # The weights are gathered in the order of the forward pass.
            modules = (stage.embedding, *stage.layers.values(), stage.final_norm)
            register_wait_hooks(optimizer.gatherer, [m for m in modules if m is not None], list(stage.parameters()))
    return optimizer


def build_pipeline(
    config: RunConfig, plan: StagePlan, stages: Mapping[int, Transformer], mesh: Mesh, scaled_loss: ScaledLoss, job: Job
) -> Executor:
    """Build the executor, which runs forward and backward passes in the order of the schedule. Collective.

    Args:
        config: the resolved configuration.
        plan: the pipeline rank of each stage, and the number of stages per rank.
        stages: this rank's stages, by their number.
        mesh: the parallel axes.
        scaled_loss: turns the loss of a micro-batch into the scalar that is differentiated.
        job: contains the device and the watchdog of this rank.
    """
    name = config.layout.pipeline_schedule
    # A fused weight gradient adds to a buffer outside the module, which would break the graph of a compiled layer.
    fusible = config.precision.gradient_accumulation_fusion and not config.batch.compile
    fused = fusible and supports_fused_weight_grad(job.device)
    weight_grad_store = WeightGradStore(fused=fused)
    if fused or schedule_kind(name).splits:
        for stage in stages.values():
            attach_weight_grad_store(stage, weight_grad_store)
    return Executor(
        stages,
        partial(make_schedule, name, mesh.pp.size, chunks=plan.chunks),
        plan.placement,
        Channels(mesh.pp, mesh.pp_back, job.device),
        scaled_loss,
        weight_grad_store,
        watch=job.watch,
        share=partial(shard_batch, cp=mesh.cp),
        early=0 if job.env.blocking else EARLY,
    )


def sample_counts(config: RunConfig) -> tuple[int, int, int]:
    """Return the numbers of samples for training, for each evaluation on the validation split, and for the test."""
    batch = config.batch
    evaluation = config.eval.eval_iters * final_batch_size(batch)
    training = batch.train_samples if batch.train_samples is not None else samples_for(batch, batch.iterations)
    return training, evaluation, evaluation
