"""The pipeline stages of a run: their layers and their ranks, computed from the configuration, so the same on all ranks."""

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

    Attributes:
        placement: the pipeline rank of each stage.
        parts: the part of the model that each stage holds.
        chunks: the number of stages on each pipeline rank.
    """

    placement: tuple[int, ...]
    parts: tuple[StagePart, ...]
    chunks: int

    @property
    def ends(self) -> tuple[int, int]:
        """The pipeline ranks of the first and of the last stage."""
        return self.placement[0], self.placement[-1]

    def stages_on(self, rank: int) -> tuple[int, ...]:
        """Return the numbers of the stages on pipeline rank `rank`, ascending."""
        return tuple(stage for stage, owner in enumerate(self.placement) if owner == rank)


def plan_stages(config: RunConfig) -> StagePlan:
    """Return the stages of a valid configuration, with model.vocab_size set.

    The layers of each stage are those that flags give; without such flags they are split so that FLOPs are balanced.
    """
    return _stages(config.model, config.layout, config.data.seq_length)


def plan_model_stages(model: ModelConfig, ranks: int = 1) -> StagePlan:
    """Return the stages of a model outside a run, on `ranks` pipeline ranks."""
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
        flops = {layer: module_flops(layer, seq_length).total for layer in meta.layers(meta.whole)}
        # The embedding costs nothing here: forward it is a lookup, backward an addition of one row per token.
        costs = [flops[meta.layer(number)] for number in meta.whole.layers]
        ranges = split_by_cost(costs, placement, last=head_flops(meta, seq_length, meta.whole))
    last = len(placement) - 1
    return StagePlan(placement, tuple(StagePart(r, s == 0, s == last) for s, r in enumerate(ranges)), chunks)


def build_schedule(config: RunConfig, dp: int) -> Schedule:
    """Return the schedule of a full global batch, checked: it has every action once and does not deadlock.

    Args:
        config: a valid resolved configuration.
        dp: the data-parallel size, which divides the micro-batches of the global batch.

    Raises:
        ConfigError: the schedule's function returned a schedule that fails these checks.
    """
    layout, name = config.layout, config.layout.pipeline_schedule
    # The largest batch of a ramp-up; the configuration's rules have checked the smaller ones.
    micro_batches = max(all_batch_sizes(config.batch)) // (config.batch.micro_batch_size * dp)
    chunks = pipeline_chunks(layout, config.model.num_layers)
    try:
        schedule = make_schedule(name, layout.pipeline_model_parallel_size, micro_batches, chunks)
        validate(schedule)
        simulate(schedule, Costs())  # raises on a deadlock
    except ValueError as error:
        raise ConfigError([Problem(flag_text("layout.pipeline_schedule", name), f"cannot be run: {error}")]) from error
    return schedule
