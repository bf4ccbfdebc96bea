"""Peak memory of each pipeline rank."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from megatron.config.optimizers import rule_for
from megatron.config.schema import RunConfig
from megatron.contract import StagePart
from megatron.mesh.grid import Grid
from megatron.parallel.cost import ActivationBytes, MicroBatchShape, module_activation_bytes
from megatron.parallel.recompute import Recompute
from megatron.pipeline.schedules.schedule import Op, Schedule
from megatron.plan.size import MetaModel, ParameterSize
from megatron.plan.stages import StagePlan
from megatron.plan.state_size import StateBytes, state_bytes


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank: `activations` is an estimate, the others are exactly what `optim/buffers.py` allocates."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """All bytes."""
        return self.weights + self.gradients + self.optimizer + self.activations


def optimizer_shards(config: RunConfig, grid: Grid) -> int:
    """Return the number of ranks that main weights and optimizer state are sharded over."""
    # Context-parallel ranks hold the same weights, as data-parallel ranks do, so the state is sharded over both.
    return grid.dp * grid.cp if config.layout.use_distributed_optimizer else 1


def parameter_state(config: RunConfig, parameters: Iterable[ParameterSize], shards: int = 1) -> StateBytes:
    """Return the bytes of weights, gradients and optimizer state of some parameters on one rank.

    Args:
        config: the run's configuration.
        parameters: the parameters, as the rank holds them.
        shards: ranks that main weights and optimizer state are sharded over.
    """
    parameters, decoupled_lr = list(parameters), config.optim.decoupled_lr is not None
    return state_bytes(
        [p.local for p in parameters],
        [(p.spec.with_own_rate() if decoupled_lr else p.spec).bucket_kind for p in parameters],
        is_16bit=config.precision.is_16bit,
        rules=[rule_for(config.optim.optimizer, p.name, p.spec.shape) for p in parameters],
        bucket=config.layout.ddp_bucket_size,
        shards=shards,
        bf16_gradients=config.precision.grad_reduce_in_bf16,
    )


def rank_state(config: RunConfig, model: MetaModel, plan: StagePlan, pp_rank: int, shards: int = 1) -> StateBytes:
    """Return the bytes of weights, gradients and optimizer state of all stages of a pipeline rank.

    Args:
        config: the run's configuration.
        model: the run's model.
        plan: the run's stages.
        pp_rank: the pipeline rank.
        shards: ranks that main weights and optimizer state are sharded over.
    """
    # By name: a rank with both ends of the model holds a tied matrix once, though two of its stages list it.
    parameters = {p.name: p for stage in plan.stages_on(pp_rank) for p in model.parameters(plan.parts[stage])}
    return parameter_state(config, parameters.values(), shards)


@dataclass(frozen=True)
class StageActivations:
    """Bytes of a stage's activations, an estimate after arXiv 2205.05198, section 4.

    Attributes:
        micro_batch: the activations of the layers and the embedding for one micro-batch.
        output: the final norm's input, 0 on a stage without the heads; the gradient of the norm's output is as large.
        transient: the most memory that one action needs in addition while it runs.
    """

    micro_batch: ActivationBytes
    output: int
    transient: int

    @classmethod
    def from_config(cls, config: RunConfig, model: MetaModel, part: StagePart) -> StageActivations:
        """Return the activations of a stage of a run.

        Args:
            config: the run's configuration.
            model: the run's model, as its layout shards it.
            part: the stage.
        """
        shape, ends = micro_batch_shape(config, model), model.ends(part)
        recompute = Recompute.from_config(config.memory, model.tp.axis, draws=False)
        layer_bytes = {layer: module_activation_bytes(layer, shape) for layer in model.layers(part)}
        layers = recompute.activation_bytes([layer_bytes[model.layer(number)] for number in part.layers], shape.hidden_bytes)
        saved = layers.saved
        if ends.embedding is not None:
            saved += module_activation_bytes(ends.embedding, shape).saved
        elif recompute.distribute is not None:  # the checkpoint saves a shard, but the executor stores the whole received input
            saved += shape.hidden_bytes
        # The heads' own activations are transient: their backward pass runs with the loss. The norm's input is stored.
        output = 0 if ends.final_norm is None else module_activation_bytes(ends.final_norm, shape).saved
        loss = module_activation_bytes(ends, shape).transient
        return cls(replace(layers, saved=saved), output, max(layers.transient, loss))

    def held(self, in_flight: int, split: int) -> int:
        """Return the bytes of activations that the stage stores between two actions.

        Args:
            in_flight: micro-batches that wait for their backward pass; the loss of all but the last is already computed.
            split: how many of these are between the two parts of a split backward pass, I and W.
        """
        per_batch = self.micro_batch
        # Between I and W the inputs and output gradients of linear layers are stored for the weight gradients; under
        # recomputation they are more than the forward pass saves.
        layers = per_batch.saved * (in_flight - split) + max(per_batch.saved, per_batch.weight_grad) * split
        # The norm's input for each micro-batch, and an output gradient of the same size for each but the last, which has no
        # loss yet.
        return layers + (self.output * (2 * in_flight - 1) if in_flight else 0)


def micro_batch_shape(config: RunConfig, model: MetaModel) -> MicroBatchShape:
    """Return the shape of one micro-batch on one rank."""
    return MicroBatchShape(
        rows=config.batch.micro_batch_size * config.model.rows_per_sample,  # a multiple-choice sample is several rows
        seq=config.data.seq_length // config.layout.context_parallel_size,
        hidden=config.model.hidden_size,
        element=2 if config.precision.is_16bit else 4,
        shared=model.tp.size if model.tp.sequence_parallel else 1,
    )


# What an action adds to `in_flight` and to `split` of `StageActivations.held`.
IN_FLIGHT_CHANGES: Mapping[Op, tuple[int, int]] = MappingProxyType({Op.F: (1, 0), Op.I: (0, 1), Op.B: (-1, 0), Op.W: (-1, -1)})


def peak_memory(
    config: RunConfig, model: MetaModel, plan: StagePlan, schedule: Schedule, pp_rank: int, shards: int = 1
) -> Memory:
    """Return the bytes on each rank of a pipeline rank at the moment of a step when activations take most.

    Args:
        config: the run's configuration.
        model: the run's model, as its layout shards it.
        plan: the run's stages.
        schedule: the schedule of one step.
        pp_rank: the pipeline rank.
        shards: ranks that main weights and optimizer state are sharded over.
    """
    stages = {stage: StageActivations.from_config(config, model, plan.parts[stage]) for stage in plan.stages_on(pp_rank)}
    in_flight, split = dict.fromkeys(stages, 0), dict.fromkeys(stages, 0)
    peak = 0
    for action in schedule.programs[pp_rank]:  # activations are stored from a micro-batch's F until its B or W
        in_flight_change, split_change = IN_FLIGHT_CHANGES[action.op]
        in_flight[action.stage] += in_flight_change
        split[action.stage] += split_change
        held = sum(stage.held(in_flight[number], split[number]) for number, stage in stages.items())
        # One action runs at a time; of the stages with a micro-batch in flight the largest transient counts, an upper bound.
        peak = max(peak, held + max(stage.transient if in_flight[number] else 0 for number, stage in stages.items()))
    state = rank_state(config, model, plan, pp_rank, shards)
    return Memory(state.weights, state.gradients, state.optimizer, peak)
