"""Durations of the actions of a step, as far as FLOPs say them."""

from __future__ import annotations

from megatron.config.schema import RunConfig
from megatron.pipeline.schedules.schedule import Op
from megatron.pipeline.schedules.simulate import MeasuredCosts
from megatron.plan import flops
from megatron.plan.stages import StagePlan


def flop_costs(config: RunConfig, plan: StagePlan) -> MeasuredCosts:
    """The durations of all actions if FLOPs were all that takes time, in units of the mean stage's forward pass."""
    seq, vocab = config.data.seq_length or 0, config.model.size("vocab_size")
    stages = [flops.stage_flops(config.model, vocab, seq, part) for part in plan.parts]
    unit = sum(stage.forward for stage in stages) / len(stages)
    times: dict[tuple[Op, int], float] = {}
    for number, stage in enumerate(stages):
        times[Op.F, number] = stage.forward / unit
        times[Op.I, number] = stage.backward / unit
        times[Op.W, number] = stage.weight / unit
        times[Op.B, number] = (stage.backward + stage.weight) / unit
    return MeasuredCosts(times)
