"""Two schedules that the package does not have, as CONTRIBUTING.md says to write them. Pure.

`vee` prescribes two chunks on each rank and splits the backward pass. `backwards` begins on the last rank and ends on the
first, and takes micro-batches in pairs. Below the first mark is what goes into `megatron/pipeline/schedules/schedule.py`.
"""

from __future__ import annotations

from megatron.pipeline.schedules.schedule import Action, Op, Schedule, ScheduleKind, v_shaped

# The functions


def vee(ranks: int, micro_batches: int) -> Schedule:
    """Take one micro-batch after the other, down the ranks and up again."""
    stages = v_shaped(ranks)
    programs: list[list[Action]] = [[] for _ in range(ranks)]
    for m in range(micro_batches):
        for op, order in ((Op.F, range(len(stages))), (Op.I, reversed(range(len(stages)))), (Op.W, range(len(stages)))):
            for stage in order:
                programs[stages[stage]].append(Action(op, stage, m))
    return Schedule("vee", micro_batches, stages, tuple(map(tuple, programs)))


def from_the_last(ranks: int, chunks: int) -> tuple[int, ...]:
    """Place stage s on rank p - 1 - s."""
    return tuple(reversed(range(ranks)))


def backwards(ranks: int, micro_batches: int) -> Schedule:
    """Take two forwards and two backwards, from the last rank to the first."""
    programs = []
    for rank in range(ranks):
        pairs = [(m, m + 1) for m in range(0, micro_batches, 2)]
        programs.append([Action(op, ranks - 1 - rank, m) for pair in pairs for op in (Op.F, Op.B) for m in pair])
    return Schedule("backwards", micro_batches, from_the_last(ranks, 1), tuple(map(tuple, programs)))


def pairs_alone(ranks: int, micro_batches: int, chunks: int) -> str | None:
    return "needs an even number of micro-batches" if micro_batches % 2 else None


# The rows
TOYS = {
    "vee": ScheduleKind(lambda p, m, v: vee(p, m), place=v_shaped, chunks=2, splits=True),
    "backwards": ScheduleKind(lambda p, m, v: backwards(p, m), place=from_the_last, objection=pairs_alone),
}
