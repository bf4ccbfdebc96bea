"""Memory of each rank at its fullest."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

from megatron.config.optimizers import rule_for
from megatron.config.schema import RunConfig
from megatron.mesh.grid import Grid
from megatron.pipeline.schedules.schedule import Op, Schedule
from megatron.plan.activations import Activations, activations_of
from megatron.plan.size import MetaModel, ParameterSize
from megatron.plan.stages import StagePlan
from megatron.plan.state_size import StateBytes, state_bytes


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank. activations is an estimate; the others are exact for `optim/buffers.py`."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations


def shards(config: RunConfig, grid: Grid) -> int:
    """Ranks that each own a slice of main weights and optimizer state."""
    return grid.dp * grid.cp if config.layout.use_distributed_optimizer else 1


def state_of(config: RunConfig, own: Iterable[ParameterSize], owners: int = 1) -> StateBytes:
    """Return the bytes of weights, gradients and optimizer state of the parameters `own` on one rank.

    Args:
        config: of the run.
        own: the parameters.
        owners: ranks that each own a slice of main weights and optimizer state.
    """
    listed = list(own)
    return state_bytes(
        [p.local for p in listed],
        [p.spec.bucket_kind for p in listed],
        two_bytes=config.precision.two_bytes,
        rules=[rule_for(config.optim.optimizer, p.name, p.spec.shape) for p in listed],
        bucket=config.layout.ddp_bucket_size,
        shards=owners,
        bf16_gradients=config.precision.grad_reduce_in_bf16,
    )


def state_of_rank(config: RunConfig, model: MetaModel, plan: StagePlan, rank: int, owners: int = 1) -> StateBytes:
    """Return the same of all stages of pipeline rank `rank`, which hold a tied matrix once."""
    return state_of(
        config, {p.name: p for stage in plan.of_rank(rank) for p in model.parameters(plan.parts[stage])}.values(), owners
    )


def memory_of(config: RunConfig, model: MetaModel, plan: StagePlan, schedule: Schedule, rank: int, owners: int = 1) -> Memory:
    """Return what each rank of pipeline rank `rank` holds when its activations take most. owners: of a slice of the state each.

    Those of a stage and micro-batch are there from its F until its B or W.
    """
    sizes, vocab, batch = config.model, config.model.size("vocab_size"), config.batch
    seq, bf16, sequence_parallel = config.data.seq_length or 0, config.precision.two_bytes, config.layout.sequence_parallel
    cp, rows = config.layout.context_parallel_size, (batch.micro_batch_size or 0) * sizes.rows

    @cache
    def activations(stage: int, waiting: int, split: int) -> Activations:
        part, tp = plan.parts[stage], model.tp.size
        counts = (sizes, vocab, tp, seq, rows, bf16, sequence_parallel, part, waiting, config.memory, cp, split)
        return activations_of(*counts)

    own = plan.of_rank(rank)
    held, split = dict.fromkeys(own, 0), dict.fromkeys(own, 0)
    most = 0
    for action in schedule.programs[rank]:
        held[action.stage] += {Op.F: 1, Op.I: 0, Op.B: -1, Op.W: -1}[action.op]
        split[action.stage] += {Op.F: 0, Op.I: 1, Op.B: 0, Op.W: -1}[action.op]
        counted = [activations(stage, held[stage], split[stage]) for stage in own]
        most = max(most, sum(a.kept for a in counted) + max(a.passing for a in counted))
    state = state_of_rank(config, model, plan, rank, owners)
    return Memory(state.weights, state.gradients, state.optimizer, most)
