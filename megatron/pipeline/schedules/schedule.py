"""Pipeline schedules as data: the actions of every pipeline rank, in order. Pure.

    stage       one contiguous slice of the model; a rank may own several (virtual stages, chunks)
    placement   stage -> the pipeline rank that owns it
    program     the ordered actions of one rank

A schedule is generated here, checked, timed and drawn by `simulate.py` and `draw.py`, completed with transfers by `lower.py`
and run by `executor.py`. To add one, write a function here and add its row to `SCHEDULES`. The command line, the rules of the
configuration, the dry run, the partition and the executor depend only on that row, and know no schedule by name. `config`
imports this file, so it imports only the standard library.

The functions' docstrings state two numbers, for p ranks, m micro-batches and v chunks on each rank, where F, B and W are the
times of a micro-batch's forward, input gradient and weight gradient on one rank, and communication takes no time:

    idle    time of a step on the first rank in excess of m (F + B + W). The bubble rate is idle / (idle + m (F + B + W)).
    peak    maximum number of activations in memory, each of one stage and one micro-batch, on rank r = 0 .. p - 1

Every schedule here works for any number of ranks and micro-batches, and any split of the layers; `ScheduleKind.objection` is
for schedules that do not. On every stage, forwards, backwards and weight gradients each run in the order of the micro-batches,
so all schedules sum gradients in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property
from types import MappingProxyType


class Op(Enum):
    """Kind of work of a stage on a micro-batch. B is I and W together."""

    F = "F"  # forward
    B = "B"  # backward: gradients of the stage's input and of its weights
    I = "I"  # backward: gradient of the stage's input alone  # noqa: E741
    W = "W"  # backward: gradients of the stage's weights alone

    __hash__ = object.__hash__  # equivalent, but faster than Enum's, which is written in Python


@dataclass(frozen=True, slots=True)
class Action:
    """One piece of work of one stage on one micro-batch, which runs without interruption."""

    op: Op
    stage: int
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.op.value}{self.stage}.{self.micro_batch}"


@dataclass(frozen=True)
class Schedule:
    """A pipeline schedule: placement[stage] is a rank; programs[rank] are its actions in order."""

    name: str
    micro_batches: int
    placement: tuple[int, ...]
    programs: tuple[tuple[Action, ...], ...]

    @property
    def ranks(self) -> int:
        """Number of pipeline ranks."""
        return len(self.programs)

    @property
    def stages(self) -> int:
        """Number of stages of all ranks."""
        return len(self.placement)

    @cached_property
    def chunk(self) -> tuple[int, ...]:
        """Number of earlier stages that a stage's rank owns, for each stage."""
        return tuple(self.placement[:stage].count(rank) for stage, rank in enumerate(self.placement))

    @cached_property
    def actions(self) -> frozenset[Action]:
        """The actions of all ranks."""
        return frozenset(action for program in self.programs for action in program)


def gpipe(ranks: int, micro_batches: int) -> Schedule:
    """Run all forwards, then all backwards (GPipe, https://arxiv.org/abs/1811.06965).

    idle (p - 1) (F + B + W); peak m.
    """
    programs = []
    for rank in range(ranks):
        forwards, backwards = _actions(Op.F, rank, micro_batches), _actions(Op.B, rank, micro_batches)
        programs.append(forwards + backwards)
    return _schedule("gpipe", micro_batches, looped(ranks, 1), programs)


def one_f_one_b(ranks: int, micro_batches: int) -> Schedule:
    """Run each backward as early as possible, so that few activations are in memory (https://arxiv.org/abs/2006.09503).

    idle (p - 1) (F + B + W); peak p - r, at most m.
    """
    programs = []
    for rank in range(ranks):
        forwards, backwards = _actions(Op.F, rank, micro_batches), _actions(Op.B, rank, micro_batches)
        programs.append(_warm_up_then_alternate(forwards, backwards, warm_up=ranks - 1 - rank))
    return _schedule("1f1b", micro_batches, looped(ranks, 1), programs)


def interleaved_1f1b(ranks: int, micro_batches: int, chunks: int) -> Schedule:
    """Run 1F1B over v chunks of the model per rank (Megatron-LM, https://arxiv.org/abs/2104.04473).

    A rank runs p micro-batches through its first chunk, the same p through its second, and so on, then the next p. If p does
    not divide m, the last group is smaller: its program is that of a full group without the missing micro-batches.

    idle (p - 1) (F + B + W) / v, if p divides m; peak 2 (p - 1 - r) + (v - 1) p + 1, at most v m. One chunk is plain 1F1B.

    Args:
        ranks: p.
        micro_batches: m.
        chunks: v.
    """
    groups = -(-micro_batches // ranks)  # rounded up
    order = [(chunk, group * ranks + m) for group in range(groups) for chunk in range(chunks) for m in range(ranks)]
    programs = []
    for rank in range(ranks):
        forwards = [Action(Op.F, chunk * ranks + rank, m) for chunk, m in order]
        backwards = [Action(Op.B, (chunks - 1 - chunk) * ranks + rank, m) for chunk, m in order]
        # With several chunks, neighbouring ranks differ by two warm-up forwards, not by one, as in Megatron-LM.
        stride = 1 if chunks == 1 else 2
        warm_up = stride * (ranks - 1 - rank) + (chunks - 1) * ranks
        programs.append(_drop_missing(micro_batches, _warm_up_then_alternate(forwards, backwards, warm_up)))
    return _schedule("interleaved", micro_batches, looped(ranks, chunks), programs)


def zero_bubble_h1(ranks: int, micro_batches: int) -> Schedule:
    """Run 1F1B with weight gradients deferred into the gaps, in the memory of 1F1B's first rank (ZB-H1, arXiv 2401.10241).

    idle (p - 1) (F + B - W), where m >= p and W <= F, B; peak p on every rank, at most m.
    """
    return _schedule("zb-h1", micro_batches, looped(ranks, 1), _defer_weight_grads(ranks, micro_batches, stride=1))


def zero_bubble_h2(ranks: int, micro_batches: int) -> Schedule:
    """Run ZB-H1 with more forwards ahead, which also fill the gap at the start, in twice the memory (ZB-H2, arXiv 2401.10241).

    idle (p - 1) (F + B - 2 W), where m >= 2 p - 1 and W <= F, B; peak 2 p - 1 on every rank, at most m.
    """
    return _schedule("zb-h2", micro_batches, looped(ranks, 1), _defer_weight_grads(ranks, micro_batches, stride=2))


def zero_bubble_v(ranks: int, micro_batches: int) -> Schedule:
    """Run two chunks per rank, down the ranks and back up, without idle time in 1F1B's memory (ZB-V, arXiv 2401.10241).

    The last stage is on the first rank, so the backward of a micro-batch starts on the rank where its forward started. For
    m < p the program is that of p micro-batches without the missing ones.

    idle 0, if F = B = W and m >= 2 p - 1; peak at most min(2 p, 2 m) on every rank, each half as large as with one chunk.
    """
    programs = []
    for rank in range(ranks):
        down, up = rank, 2 * ranks - 1 - rank
        remaining = ranks - rank  # this rank and those after it
        whole_up = [(Op.F, up), (Op.I, up), (Op.W, up)]
        # Forwards of the first chunk, until the first micro-batch has been through the later ranks and returns,
        order = [(Op.F, down)] * (2 * remaining - 1)
        # then of both chunks in turn, until the first gradient arrives from the earlier ranks.
        order += [(Op.F, up), (Op.F, down)] * rank
        # The memory is full: no new micro-batch starts until a gradient has been to the last rank and returned.
        order += whole_up * remaining
        # Then a new micro-batch starts for each that is finished.
        order += [(Op.F, down), (Op.I, down), (Op.W, down), *whole_up] * (micro_batches - ranks)
        # No forwards are left: first the gradients that other ranks wait for, then the weight gradients deferred for them.
        order += [(Op.I, down), (Op.I, up)] * rank
        order += [(Op.I, down), (Op.W, down)] * remaining
        order += [(Op.W, up)] * rank + [(Op.W, down)] * rank
        programs.append(_drop_missing(micro_batches, _number_micro_batches(order)))
    return _schedule("zb-v", micro_batches, v_shaped(ranks), programs)


def looped(ranks: int, chunks: int) -> tuple[int, ...]:
    """Return the placement of stage s on rank s % ranks."""
    return tuple(range(ranks)) * chunks


def v_shaped(ranks: int, chunks: int = 2) -> tuple[int, ...]:
    """Return the placement down the ranks and back up.

    Rank r owns stages r and 2 p - 1 - r, so the last stage shares a rank with the first.
    """
    return tuple(range(ranks)) + tuple(reversed(range(ranks)))


@dataclass(frozen=True)
class ScheduleKind:
    """A kind of schedule, for any numbers of ranks and micro-batches.

    make: (ranks, micro-batches, chunks) -> Schedule. place: (ranks, chunks) -> placement.
    chunks: number of stages on each rank; None if the user chooses it. splits: the backward is split into I and W.
    objection: (ranks, micro-batches, chunks) -> "needs ..." if the schedule does not support these numbers, else None.
    """

    make: Callable[[int, int, int], Schedule]
    place: Callable[[int, int], tuple[int, ...]] = looped
    chunks: int | None = 1
    splits: bool = False
    objection: Callable[[int, int, int], str | None] = lambda ranks, micro_batches, chunks: None


SCHEDULES: Mapping[str, ScheduleKind] = MappingProxyType(
    {
        "gpipe": ScheduleKind(lambda p, m, v: gpipe(p, m)),
        "1f1b": ScheduleKind(lambda p, m, v: one_f_one_b(p, m)),
        "interleaved": ScheduleKind(interleaved_1f1b, chunks=None),
        "zb-h1": ScheduleKind(lambda p, m, v: zero_bubble_h1(p, m), splits=True),
        "zb-h2": ScheduleKind(lambda p, m, v: zero_bubble_h2(p, m), splits=True),
        "zb-v": ScheduleKind(lambda p, m, v: zero_bubble_v(p, m), place=v_shaped, chunks=2, splits=True),
    }
)
DEFAULT_SCHEDULE = "1f1b"
DEFAULT_WITH_CHUNKS = "interleaved"  # if the user configures virtual stages but no schedule
DEFAULT_CHUNKS = 2  # if the user may choose the number and did not


def schedule_kind(name: str) -> ScheduleKind:
    """Return the row of a schedule. KeyError for an unknown name."""
    return SCHEDULES[name]


def schedule_names(wanted: Callable[[ScheduleKind], bool]) -> str:
    """Return the names of the schedules for which `wanted` is true, for a message: `a, b or c`."""
    *names, last = [name for name, kind in SCHEDULES.items() if wanted(kind)]
    return f"{', '.join(names)} or {last}" if names else last


def make_schedule(name: str, ranks: int, micro_batches: int, chunks: int | None = None) -> Schedule:
    """Return the schedule called `name`.

    Args:
        name: a key of `SCHEDULES`.
        ranks: number of pipeline ranks.
        micro_batches: number of micro-batches of a step.
        chunks: number of stages on each rank; None: the number that the schedule prescribes, or 2 if it prescribes none.

    Raises:
        ValueError: an unknown name, fewer than one rank, micro-batch or chunk, or numbers that the schedule does not support;
            also if the generated schedule contradicts its row.
    """
    if name not in SCHEDULES:
        raise ValueError(f"unknown schedule {name}; known are {', '.join(SCHEDULES)}")
    kind = SCHEDULES[name]
    if chunks is None:
        chunks = kind.chunks or DEFAULT_CHUNKS
    for count, what in ((ranks, "pipeline ranks"), (micro_batches, "micro-batches"), (chunks, "chunks per rank")):
        if count < 1:
            raise ValueError(f"{name} needs at least 1 of {what}, not {count}")
    if kind.chunks not in (None, chunks):
        free = schedule_names(lambda other: other.chunks is None)
        raise ValueError(f"{name} has chunks per rank: {kind.chunks}, not {chunks}; leave chunks out, or take {free}")
    if (objection := kind.objection(ranks, micro_batches, chunks)) is not None:
        raise ValueError(f"{name} {objection}, not {ranks} pipeline ranks, {micro_batches} micro-batches and {chunks} chunks")
    schedule = replace(kind.make(ranks, micro_batches, chunks), name=name)
    _check_row(schedule, kind, chunks)
    return schedule


def _check_row(schedule: Schedule, kind: ScheduleKind, chunks: int) -> None:
    """Raise ValueError if a schedule contradicts its row, by which the run builds its stages."""
    place = kind.place(schedule.ranks, chunks)
    if schedule.placement != place:
        raise ValueError(f"{schedule.name}: its stages are on ranks {schedule.placement}, and its row's `place` says {place}")
    if len(place) != schedule.ranks * chunks:
        raise ValueError(f"{schedule.name}: its row says {chunks} chunks per rank, and `place` gives {len(place)} stages")
    if any((action.op is Op.B) == kind.splits for action in schedule.programs[0] if action.op is not Op.F):
        raise ValueError(f"{schedule.name}: its row says splits={kind.splits}, and its backward actions say otherwise")


def _actions(op: Op, stage: int, micro_batches: int) -> list[Action]:
    return [Action(op, stage, m) for m in range(micro_batches)]


def _warm_up_then_alternate(forwards: Sequence[Action], backwards: Sequence[Action], warm_up: int) -> list[Action]:
    """Return `warm_up` forwards, then pairs of forward and backward until no forwards are left, then the other backwards."""
    warm_up = min(warm_up, len(forwards))
    steady = [action for pair in zip(forwards[warm_up:], backwards, strict=False) for action in pair]
    return [*forwards[:warm_up], *steady, *backwards[len(forwards) - warm_up :]]


def _defer_weight_grads(ranks: int, micro_batches: int, stride: int) -> list[list[Action]]:
    """Return the programs of ZB-H1 and ZB-H2: 1F1B with each rank's weight gradients deferred.

    Rank r is stride (p - 1 - r) forwards ahead of its backwards and defers stride r weight gradients, so that all ranks have
    the same number of activations in memory. The deferred ones run at the end, while gradients travel to the first rank.
    """
    programs = []
    for rank in range(ranks):
        forwards, inputs = _actions(Op.F, rank, micro_batches), _actions(Op.I, rank, micro_batches)
        program: list[Action] = []
        for action in _warm_up_then_alternate(forwards, inputs, warm_up=stride * (ranks - 1 - rank)):
            program.append(action)
            if action.op is Op.I and action.micro_batch >= stride * rank:
                program.append(Action(Op.W, rank, action.micro_batch - stride * rank))
        deferred = min(stride * rank, micro_batches)
        programs.append(program + _actions(Op.W, rank, micro_batches)[micro_batches - deferred :])
    return programs


def _number_micro_batches(order: Sequence[tuple[Op, int]]) -> list[Action]:
    """Return the actions of a list of (op, stage), where each pair's occurrences get the micro-batches 0, 1, 2, ..."""
    next_micro_batch: dict[tuple[Op, int], int] = {}
    program = []
    for op, stage in order:
        m = next_micro_batch.get((op, stage), 0)
        next_micro_batch[op, stage] = m + 1
        program.append(Action(op, stage, m))
    return program


def _drop_missing(micro_batches: int, program: Sequence[Action]) -> list[Action]:
    """Return the program without actions of missing micro-batches, on which no other action depends."""
    return [action for action in program if action.micro_batch < micro_batches]


def _schedule(name: str, micro_batches: int, placement: tuple[int, ...], programs: Sequence[Sequence[Action]]) -> Schedule:
    return Schedule(name, micro_batches, placement, tuple(tuple(program) for program in programs))
