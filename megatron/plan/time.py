"""Durations of the actions of a step, estimated from their FLOPs."""

from __future__ import annotations

from megatron.config.schema import RunConfig
from megatron.pipeline.schedules.schedule import Op
from megatron.pipeline.schedules.simulate import MeasuredCosts
from megatron.plan.flops import stage_flops
from megatron.plan.size import MetaModel
from megatron.plan.stages import StagePlan


def flop_costs(config: RunConfig, plan: StagePlan) -> MeasuredCosts:
    """Return the durations of all actions in units of the mean stage's forward pass, proportional to their FLOPs."""
    model = MetaModel(config.model)
    stages = [stage_flops(model, config.data.seq_length, part) for part in plan.parts]
    # The share of the bubble depends only on the ratios between stages, so no device's FLOP rate is needed.
    unit = sum(stage.forward for stage in stages) / len(stages)
    times: dict[tuple[Op, int], float] = {}
    for number, stage in enumerate(stages):
        times[Op.F, number] = stage.forward / unit
        times[Op.I, number] = stage.backward / unit
        times[Op.W, number] = stage.weight / unit
        times[Op.B, number] = (stage.backward + stage.weight) / unit
    return MeasuredCosts(times)
