"""Memory of each rank at its fullest."""

from __future__ import annotations

from functools import cache

from megatron.config.schema import RunConfig
from megatron.mesh.grid import Grid
from megatron.pipeline.schedules.schedule import Op, Schedule
from megatron.plan import size
from megatron.plan.stages import StagePlan


def shards(config: RunConfig, grid: Grid) -> int:
    """Ranks that each own a slice of main weights and optimizer state."""
    return grid.dp * grid.cp if config.layout.use_distributed_optimizer else 1


def memory_of(config: RunConfig, tp: int, plan: StagePlan, schedule: Schedule, rank: int, owners: int = 1) -> size.Memory:
    """Return what each rank of pipeline rank `rank` holds when its activations take most. owners: of a slice of the state each.

    Those of a stage and micro-batch are there from its F until its B or W.
    """
    model, vocab, batch = config.model, config.model.size("vocab_size"), config.batch
    seq, bf16, sequence_parallel = config.data.seq_length or 0, config.precision.two_bytes, config.layout.sequence_parallel
    cp, rows = config.layout.context_parallel_size, (batch.micro_batch_size or 0) * model.rows

    @cache
    def activations(stage: int, waiting: int, split: int) -> size.Activations:
        counts = (model, vocab, tp, seq, rows, bf16, sequence_parallel, plan.parts[stage], waiting, config.memory, cp, split)
        return size.activations_of(*counts)

    own = plan.of_rank(rank)
    held, split = dict.fromkeys(own, 0), dict.fromkeys(own, 0)
    most, then = 0, (dict(held), dict(split))
    for action in schedule.programs[rank]:
        held[action.stage] += {Op.F: 1, Op.I: 0, Op.B: -1, Op.W: -1}[action.op]
        split[action.stage] += {Op.F: 0, Op.I: 1, Op.B: 0, Op.W: -1}[action.op]
        counted = [activations(stage, held[stage], split[stage]) for stage in own]
        now = sum(a.kept for a in counted) + max(a.passing for a in counted)
        if now > most:
            most, then = now, (dict(held), dict(split))
    return size.memory_per_rank(
        model,
        vocab,
        tp=tp,
        seq=seq,
        micro_batch=rows,
        bf16=bf16,
        sequence_parallel=sequence_parallel,
        optimizer=config.optim.optimizer,
        stages=[plan.parts[stage] for stage in own],
        in_flight=[then[0][stage] for stage in own],
        split=[then[1][stage] for stage in own],
        cp=cp,
        memory=config.memory,
        bucket=config.layout.ddp_bucket_size,
        shards=owners,
        bf16_gradients=config.precision.grad_reduce_in_bf16,
    )
