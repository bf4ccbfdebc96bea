"""Memory of each rank at its fullest."""

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
    """Bytes on one rank. activations: an estimate; the others are exact for `optim/buffers.py`."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """All bytes."""
        return self.weights + self.gradients + self.optimizer + self.activations


def optimizer_shards(config: RunConfig, grid: Grid) -> int:
    """Return the number of ranks that each own a slice of main weights and optimizer state."""
    # Ranks of one context-parallel group hold the same weights too, so they share the state as data-parallel ones do.
    return grid.dp * grid.cp if config.layout.use_distributed_optimizer else 1


def parameter_state(config: RunConfig, own: Iterable[ParameterSize], owners: int = 1) -> StateBytes:
    """Return the bytes of weights, gradients and optimizer state of the parameters `own` on one rank.

    Args:
        config: of the run.
        own: the parameters.
        owners: ranks that each own a slice of main weights and optimizer state.
    """
    listed, own_rate = list(own), config.optim.decoupled_lr is not None
    return state_bytes(
        [p.local for p in listed],
        [(p.spec.with_own_rate() if own_rate else p.spec).bucket_kind for p in listed],
        is_16bit=config.precision.is_16bit,
        rules=[rule_for(config.optim.optimizer, p.name, p.spec.shape) for p in listed],
        bucket=config.layout.ddp_bucket_size,
        shards=owners,
        bf16_gradients=config.precision.grad_reduce_in_bf16,
    )


def rank_state(config: RunConfig, model: MetaModel, plan: StagePlan, rank: int, owners: int = 1) -> StateBytes:
    """Return the bytes of weights, gradients and optimizer state of all stages of a pipeline rank.

    Args:
        config: of the run.
        model: the run's.
        plan: the run's stages.
        rank: the pipeline rank.
        owners: ranks that each own a slice of main weights and optimizer state.
    """
    # By name: a rank with both ends of the model holds a tied matrix once, though two of its stages list it.
    own = {p.name: p for stage in plan.stages_on(rank) for p in model.parameters(plan.parts[stage])}
    return parameter_state(config, own.values(), owners)


@dataclass(frozen=True)
class StageActivations:
    """Bytes of a stage's activations, an estimate after arXiv 2205.05198, section 4.

    micro_batch: what the layers and the embedding take for one micro-batch. output: of the input of the final norm, where the
    stage has the heads; the gradient of its output is as large. transient: while one action runs, at most.
    """

    micro_batch: ActivationBytes
    output: int
    transient: int

    @classmethod
    def from_config(cls, config: RunConfig, model: MetaModel, part: StagePart) -> StageActivations:
        """Return the activations of a stage of a run.

        Args:
            config: of the run.
            model: the run's, as its layout cuts it.
            part: the stage.
        """
        shape, ends = micro_batch_shape(config, model), model.ends(part)
        recompute = Recompute.from_config(config.memory, model.tp.axis, draws=False)
        each = {layer: module_activation_bytes(layer, shape) for layer in model.layers(part)}
        layers = recompute.activation_bytes([each[model.layer(number)] for number in part.layers], shape.hidden_bytes)
        saved = layers.saved
        if ends.embedding is not None:
            saved += module_activation_bytes(ends.embedding, shape).saved
        elif recompute.distribute is not None:  # the executor holds what came from another rank
            saved += shape.hidden_bytes
        # The heads' own activations never wait: the loss and its gradient are made at once, and the norm's input is kept.
        output = 0 if ends.final_norm is None else module_activation_bytes(ends.final_norm, shape).saved
        loss = module_activation_bytes(ends, shape).transient
        return cls(replace(layers, saved=saved), output, max(layers.transient, loss))

    def held(self, in_flight: int, split: int) -> int:
        """Return what is there between actions.

        Args:
            in_flight: micro-batches that wait for their backward pass. The loss of each is made, but for the last one's.
            split: how many of these are between the parts of a split backward pass, and have the factors of their weights'
                gradients, however little they kept.
        """
        each = self.micro_batch
        # Between I and W the factors of the weight gradients wait; under recomputation they are more than a forward pass keeps.
        layers = each.saved * (in_flight - split) + max(each.saved, each.weight_grad) * split
        # The norm's input for each, and as large a gradient of its output for each but the last, whose loss is still to come.
        return layers + (self.output * (2 * in_flight - 1) if in_flight else 0)


def micro_batch_shape(config: RunConfig, model: MetaModel) -> MicroBatchShape:
    """Return the micro-batch of a run as a rank sees it."""
    return MicroBatchShape(
        rows=config.batch.micro_batch_size * config.model.rows_per_sample,  # a multiple-choice sample is several rows
        seq=config.data.seq_length // config.layout.context_parallel_size,
        hidden=config.model.hidden_size,
        element=2 if config.precision.is_16bit else 4,
        shared=model.tp.size if model.tp.sequence_parallel else 1,
    )


# What an action adds to: micro-batches in flight, and those of them that are between the parts of a split backward pass.
IN_FLIGHT_CHANGES: Mapping[Op, tuple[int, int]] = MappingProxyType({Op.F: (1, 0), Op.I: (0, 1), Op.B: (-1, 0), Op.W: (-1, -1)})


def peak_memory(config: RunConfig, model: MetaModel, plan: StagePlan, schedule: Schedule, rank: int, owners: int = 1) -> Memory:
    """Return what each rank of a pipeline rank holds when its activations take most.

    Args:
        config: of the run.
        model: the run's, as its layout cuts it.
        plan: its stages.
        schedule: of a step.
        rank: the pipeline rank.
        owners: ranks that each own a slice of main weights and optimizer state.
    """
    own = {stage: StageActivations.from_config(config, model, plan.parts[stage]) for stage in plan.stages_on(rank)}
    in_flight, split = dict.fromkeys(own, 0), dict.fromkeys(own, 0)
    most = 0
    for action in schedule.programs[rank]:  # activations are there from a micro-batch's F on until its B or W
        waiting, halfway = IN_FLIGHT_CHANGES[action.op]
        in_flight[action.stage] += waiting
        split[action.stage] += halfway
        held = sum(stage.held(in_flight[number], split[number]) for number, stage in own.items())
        # One action runs at a time, and nothing says which stage's is the next: the largest that has work counts.
        most = max(most, held + max(stage.transient if in_flight[number] else 0 for number, stage in own.items()))
    state = rank_state(config, model, plan, rank, owners)
    return Memory(state.weights, state.gradients, state.optimizer, most)
