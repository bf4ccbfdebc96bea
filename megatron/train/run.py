"""A run, built from its configuration: a list of what exists, in the order in which it comes to be."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

from megatron.config.schema import LayoutConfig, RunConfig
from megatron.contract import StagePart
from megatron.mesh.grid import Grid
from megatron.mesh.launch import Job
from megatron.mesh.mesh import Mesh
from megatron.model.gpt import GPT
from megatron.model.init import fill
from megatron.optim.buffers import Weights, flat_buffers
from megatron.optim.lr import Schedule
from megatron.optim.optimizer import Optimizer
from megatron.parallel.spec import Checkpointable, spec_of
from megatron.pipeline.executor import Executor
from megatron.train.state import TrainState
from megatron.train.step import Step, objective


@dataclass
class Run:
    """Everything a step needs, and nothing that only the loop needs."""

    config: RunConfig
    job: Job
    mesh: Mesh
    model: GPT
    weights: Weights
    optimizer: Optimizer
    pipeline: Executor
    step: Step
    state: TrainState

    def parts(self, *, optimizer: bool = True, state: bool = True) -> dict[str, Checkpointable]:
        """What a checkpoint holds, by the prefix of its tensors' names."""
        parts: dict[str, Checkpointable] = {"model": self.weights}
        if optimizer:
            parts["optimizer"] = self.optimizer
        if state:
            parts["train"] = self.state
        return parts


def grid_of(layout: LayoutConfig, world_size: int) -> Grid:
    """The grid of a layout; data parallelism takes what is left. ValueError when the sizes do not divide the world."""
    tp, pp, cp = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size, layout.context_parallel_size
    if world_size % (tp * pp * cp):
        raise ValueError(f"{world_size} ranks do not divide by tp {tp} x pp {pp} x cp {cp}")
    return Grid(pp=pp, dp=world_size // (tp * pp * cp), cp=cp, tp=tp)


def build(config: RunConfig, job: Job, *, schedule: Schedule | None = None) -> Run:
    """Mesh, model with its initial weights, optimizer and pipeline, for this rank. Collective.

    config must be resolved, with model.vocab_size set. schedule: another one than the configuration's (a resumed run's).
    """
    mesh = Mesh.build(grid_of(config.layout, job.place.world_size), job.place.rank, job.timeout)
    model = GPT(
        config.model,
        StagePart(range(config.model.size("num_layers")), embedding=True, head=True),
        mesh.tp,
        sequence_parallel=config.layout.sequence_parallel,
        seed=config.batch.seed,
        dtype=torch.bfloat16 if config.precision.bf16 else torch.float32,
        device=job.device,
    )
    buffers = flat_buffers(model.parameters())
    for buffer in buffers:
        specs = (spec_of(p) for p in buffer.parameters)
        fill(zip(specs, buffer.views(buffer.main), strict=True), config.model, config.batch.seed)
        buffer.publish()
    if config.batch.compile:
        for block in model.layers.values():
            block.compile()
    optimizer = Optimizer(
        buffers,
        config.optim,
        mesh,
        log_zeros=config.log.log_num_zeros_in_grad,
        log_params_norm=config.log.log_params_norm,
    )
    seq_length = config.data.seq_length or config.model.size("max_position_embeddings")
    pipeline = Executor(model, objective(config.batch, seq_length, mesh.dp.size), job.device)
    schedule = schedule or Schedule.of(config.optim, config.batch)
    step = Step(pipeline, optimizer, schedule, mesh, config.batch, seq_length)
    if config.model.fused_attention_dropout and config.model.attention_dropout > 0.0:
        step.torch_random = job.device
    state = TrainState(schedule=asdict(schedule))
    return Run(config, job, mesh, model, Weights(buffers), optimizer, pipeline, step, state)


def sample_counts(config: RunConfig) -> tuple[int, int, int]:
    """Samples that training, each validation and the test will read."""
    size, steps = config.batch.global_batch_size or 1, config.batch.train_iters or 0
    evaluation = config.eval.eval_iters * size
    training = config.batch.train_samples if config.batch.train_samples is not None else steps * size
    return training, evaluation, evaluation
