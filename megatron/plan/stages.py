"""The pipeline stages of a run: which layers, on which rank. The same for all ranks, from the configuration alone."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.config.batch import all_batch_sizes
from megatron.config.errors import ConfigError, Problem
from megatron.config.options import flag_text
from megatron.config.pipeline import explicit_stage_layers, pipeline_chunks
from megatron.config.schema import LayoutConfig, ModelConfig, RunConfig
from megatron.contract import StagePart
from megatron.parallel.cost import module_flops
from megatron.pipeline.partition import ranges_from_counts, split_by_cost
from megatron.pipeline.schedules.schedule import DEFAULT_SCHEDULE, Schedule, make_schedule, schedule_kind
from megatron.pipeline.schedules.simulate import Costs, simulate, validate
from megatron.plan.flops import head_flops
from megatron.plan.size import MetaModel


@dataclass(frozen=True)
class StagePlan:
    """Stages of a run.

    placement: stage -> pipeline rank. parts: what each stage owns of the model. chunks: stages of each rank.
    """

    placement: tuple[int, ...]
    parts: tuple[StagePart, ...]
    chunks: int

    def stages_on(self, rank: int) -> tuple[int, ...]:
        """Return the numbers of a pipeline rank's stages, ascending."""
        return tuple(stage for stage, owner in enumerate(self.placement) if owner == rank)


def plan_stages(config: RunConfig) -> StagePlan:
    """Return the stages of a legal configuration, with model.vocab_size set.

    Where the flags give the layers of each stage, these are taken; otherwise the ranks get equal FLOPs.
    """
    return _stages(config.model, config.layout, config.data.seq_length)


def plan_model_stages(model: ModelConfig, ranks: int = 1) -> StagePlan:
    """Return the stages of a model apart from a run, shared by so many pipeline ranks."""
    layout = LayoutConfig(pipeline_model_parallel_size=ranks, pipeline_schedule=DEFAULT_SCHEDULE)
    return _stages(model, layout, model.max_position_embeddings)


def _stages(model: ModelConfig, layout: LayoutConfig, seq_length: int) -> StagePlan:
    layers = model.num_layers
    chunks = pipeline_chunks(layout, layers)
    placement = schedule_kind(layout.pipeline_schedule).place(layout.pipeline_model_parallel_size, chunks)
    if (counts := explicit_stage_layers(layout, layers)) is not None:
        ranges = ranges_from_counts(counts)
    else:
        meta = MetaModel(model)
        each = {layer: module_flops(layer, seq_length).total for layer in meta.layers(meta.whole)}
        # The embedding counts as nothing: it is a lookup, and its backward pass adds up a row a token, with no matrix product.
        work = [each[meta.layer(number)] for number in meta.whole.layers]
        ranges = split_by_cost(work, placement, last=head_flops(meta, seq_length, meta.whole))
    last = len(placement) - 1
    return StagePlan(placement, tuple(StagePart(r, s == 0, s == last) for s, r in enumerate(ranges)), chunks)


def build_schedule(config: RunConfig, dp: int) -> Schedule:
    """Return the schedule of a full global batch, which was checked: each action is there once, and none waits for ever.

    Args:
        config: resolved and legal.
        dp: data-parallel ranks, which share the micro-batches.

    Raises:
        ConfigError: the schedule's function makes another one than it should.
    """
    layout, name = config.layout, config.layout.pipeline_schedule
    # Where the batch size ramps up, the full one: rules of the configuration have asked the schedule about the others.
    micro_batches = max(all_batch_sizes(config.batch)) // (config.batch.micro_batch_size * dp)
    chunks = pipeline_chunks(layout, config.model.num_layers)
    try:
        schedule = make_schedule(name, layout.pipeline_model_parallel_size, micro_batches, chunks)
        validate(schedule)
        simulate(schedule, Costs())  # finds programs that wait for one another for ever
    except ValueError as error:
        raise ConfigError([Problem(flag_text("layout.pipeline_schedule", name), f"cannot be run: {error}")]) from error
    return schedule
