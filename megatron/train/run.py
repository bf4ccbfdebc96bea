"""A run, built from its configuration: a list of what exists, in the order in which it comes to be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
from torch import nn

from megatron.config.batch import full_batch_size, samples_for
from megatron.config.schema import RunConfig
from megatron.contract import Batch
from megatron.launch.job import Job
from megatron.mesh.grid import Grid
from megatron.mesh.mesh import Mesh
from megatron.model.attention import Attend, bidirectional_attention, causal_attention
from megatron.model.build import build_stages
from megatron.model.gpt import GPT
from megatron.model.init import fill
from megatron.optim.buffers import Weights, flat_buffers
from megatron.optim.gather import wait_in_turn
from megatron.optim.lr import Schedule
from megatron.optim.optimizer import Optimizer
from megatron.optim.precision import Precision
from megatron.parallel.recompute import Recompute
from megatron.parallel.ring import RingAttention, share
from megatron.parallel.spec import Checkpointable, describe, spec_of
from megatron.parallel.tensor_parallel import TensorParallel
from megatron.parallel.weight_grad import WeightWork, can_add_products, manage_weight_gradients
from megatron.pipeline.executor import Executor
from megatron.pipeline.schedules.lower import EARLY
from megatron.pipeline.schedules.schedule import DEFAULT, kind_of, make
from megatron.pipeline.transfer import Channels
from megatron.plan.stages import stages_of
from megatron.train.report import StepReport
from megatron.train.state import TrainState
from megatron.train.step import Objective, Step

DECOUPLED = ("embedding.word.weight", "head.weight")  # what --decoupled-lr is for


@dataclass
class Run:
    """Everything a step needs, and nothing that only the loop needs.

    stages: this rank's, by their number. step: a `train.step.Step`, or what wraps one. schedule: of the learning rate.
    """

    config: RunConfig
    job: Job
    mesh: Mesh
    stages: dict[int, GPT]
    weights: Weights
    optimizer: Optimizer
    pipeline: Executor
    step: Callable[[Sequence[Batch], TrainState], StepReport]
    schedule: Schedule
    state: TrainState

    def parts(self, *, optimizer: bool = True, state: bool = True) -> dict[str, Checkpointable]:
        """What a checkpoint holds, by the prefix of its tensors' names."""
        parts: dict[str, Checkpointable] = {"model": self.weights}
        if optimizer:
            parts["optimizer"] = self.optimizer
        if state:
            parts["train"] = self.state
        return parts


def core_attention(mesh: Mesh, *, causal: bool, compiled: bool) -> Attend:
    """The core attention of a layout. compiled: for layers that are compiled, which go around what communicates."""
    if mesh.cp.size == 1:
        return causal_attention if causal else bidirectional_attention
    ring = RingAttention(mesh.cp, causal=causal)
    return torch.compiler.disable(ring.__call__) if compiled else ring  # type: ignore[no-untyped-call]


def build(config: RunConfig, job: Job, *, schedule: Schedule | None = None) -> Run:
    """Mesh, model with its initial weights, optimizer and pipeline, for this rank. Collective.

    config must be resolved, with model.vocab_size set. schedule: another one than the configuration's (a resumed run's).
    """
    plan, precision = stages_of(config), Precision.of(config.precision)
    grid = Grid.from_layout(config.layout, job.place.world_size)
    mesh = Mesh.build(grid, job.place.rank, job.timeout, (plan.placement[0], plan.placement[-1]), job.watch)
    job.watch.waiting("building the model")
    draws = config.model.fused_attention_dropout and config.model.attention_dropout > 0.0
    stages = build_stages(
        config.model,
        plan.placement,
        plan.parts,
        TensorParallel(mesh.tp, config.layout.sequence_parallel),
        mesh.pp.rank,
        seed=config.batch.seed,
        attend=core_attention(mesh, causal=config.model.architecture == "gpt", compiled=config.batch.compile),
        recompute=Recompute.of(config.memory, mesh.tp, draws=draws),
        dtype=precision.compute,
        device=job.device,
    )
    layout, parameters = config.layout, list(nn.ModuleList(stages.values()).parameters())
    schedule = schedule or Schedule.of(config.optim, config.batch)
    for p in parameters if schedule.decoupled else ():
        describe(p, replace(spec_of(p), decoupled=spec_of(p).name in DECOUPLED))
    sharded, grad_dtype = layout.use_distributed_optimizer, precision.gradients
    buffers = flat_buffers(parameters, layout.ddp_bucket_size, mesh, sharded=sharded, grad_dtype=grad_dtype)
    for buffer in buffers:
        specs, whole = (spec_of(p) for p in buffer.parameters), buffer.staging_tensor()
        fill(zip(specs, buffer.views(whole), strict=True), config.model, config.batch.seed)
        buffer.load(whole)
    if config.batch.compile:
        for stage in stages.values():
            for block in stage.layers.values():
                block.compile()
    optimizer = Optimizer(
        buffers,
        config.optim,
        mesh,
        log_zeros=config.log.log_num_zeros_in_grad,
        log_params_norm=config.log.log_params_norm,
        overlap_grad_reduce=layout.overlap_grad_reduce,
        overlap_param_gather=layout.overlap_param_gather,
    )
    if layout.overlap_param_gather:
        for stage in stages.values():
            called = (stage.embedding, *stage.layers.values(), stage.final_norm)
            wait_in_turn(optimizer.gatherer, [m for m in called if m is not None], list(stage.parameters()))
    seq_length = config.data.seq_length or config.model.size("max_position_embeddings")
    # A compiled layer is one graph, which an addition to a buffer outside would cut.
    fused = config.precision.gradient_accumulation_fusion and not config.batch.compile and can_add_products(job.device)
    name, work = config.layout.pipeline_schedule or DEFAULT, WeightWork(fused=fused)
    if kind_of(name).splits or work.fused:
        for stage in stages.values():
            manage_weight_gradients(stage, work)
    state = TrainState(schedule=asdict(schedule), scaler=precision.scaler())
    aim = Objective(
        config.batch,
        seq_length,
        mesh.dp,
        state.scaler,
        masked=config.data.eod_mask_loss or config.model.architecture == "bert",
        binary=config.model.predicts_order,
        device=job.device,
    )
    pipeline = Executor(
        stages,
        partial(make, name, mesh.pp.size, chunks=plan.chunks),
        plan.placement,
        Channels(mesh.pp, mesh.pp_back, job.device),
        aim,
        work,
        job.watch,
        partial(share, cp=mesh.cp),
        early=0 if job.place.blocking else EARLY,
    )
    step = Step(aim, pipeline, optimizer, schedule, mesh, config.batch, seq_length, job.watch)
    if draws:
        step.torch_random = job.device
    return Run(config, job, mesh, stages, Weights(buffers), optimizer, pipeline, step, schedule, state)


def sample_counts(config: RunConfig) -> tuple[int, int, int]:
    """Samples that training, each validation and the test will read."""
    batch = config.batch
    evaluation = config.eval.eval_iters * full_batch_size(batch)
    training = batch.train_samples if batch.train_samples is not None else samples_for(batch, batch.train_iters or 0)
    return training, evaluation, evaluation
