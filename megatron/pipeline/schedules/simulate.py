"""Check a schedule, and compute its timeline from the durations of its actions without running it. Pure.

A rank runs one action at a time, in the order of its program. An action starts when the rank is free and all inputs have
arrived; a result arrives on another rank after the time `communication`, during which both ranks continue to compute. This
model and the bubble rate are those of "Zero Bubble Pipeline Parallelism" (https://arxiv.org/abs/2401.10241).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from megatron.pipeline.schedules.schedule import Action, Op, Schedule


class CostModel(Protocol):
    """Durations of actions and transfers, all in the same unit of time."""

    @property
    def communication(self) -> float:
        """Time from the end of an action until its result has arrived on another rank."""

    def duration(self, action: Action) -> float:
        """Return the time that the action occupies its rank."""


@dataclass(frozen=True)
class Costs:
    """Costs that are the same for every stage, in any unit of time.

    backward: time of the input gradient only, so that a whole backward takes backward + weight. ValueError for a cost that is
    negative or not finite.
    """

    forward: float = 1.0
    backward: float = 1.0
    weight: float = 1.0
    communication: float = 0.0

    def __post_init__(self) -> None:
        for name, cost in vars(self).items():
            _check_cost(name, cost)

    def duration(self, action: Action) -> float:
        """Return the duration of an action, which does not depend on its stage."""
        match action.op:
            case Op.F:
                return self.forward
            case Op.I:
                return self.backward
            case Op.W:
                return self.weight
            case Op.B:
                return self.backward + self.weight


@dataclass(frozen=True)
class MeasuredCosts:
    """Costs that differ between stages: times[op, stage], in any unit of time.

    ValueError for a cost that is negative or not finite; `duration` raises it for an action that was not measured.
    """

    times: Mapping[tuple[Op, int], float]
    communication: float = 0.0

    def __post_init__(self) -> None:
        _check_cost("communication", self.communication)
        for (op, stage), cost in self.times.items():
            _check_cost(f"{op.value} of stage {stage}", cost)

    def duration(self, action: Action) -> float:
        """Return the measured time of an action's kind on its stage."""
        try:
            return self.times[action.op, action.stage]
        except KeyError:
            raise ValueError(f"no time was measured for {action.op.value} of stage {action.stage}") from None


@dataclass(frozen=True)
class Timeline:
    """Start and end of every action of a schedule, in the same unit of time on the same clock, and derived measures."""

    schedule: Schedule
    start: Mapping[Action, float]
    end: Mapping[Action, float]

    @cached_property
    def origin(self) -> float:
        """Start of the first action on any rank: 0 in a simulation, the clock's time in a measurement."""
        return min(self.start.values(), default=0.0)

    @cached_property
    def makespan(self) -> float:
        """Time from the first start to the last end over all ranks."""
        return max(self.end.values(), default=0.0) - self.origin

    @cached_property
    def span(self) -> tuple[float, ...]:
        """Per rank: time from its own first start to its own last end; 0 for a rank without actions."""
        return tuple(
            max(self.end[a] for a in program) - min(self.start[a] for a in program) if program else 0.0
            for program in self.schedule.programs
        )

    @cached_property
    def cost(self) -> float:
        """The largest span: the time per step if consecutive steps do not wait until all ranks have finished."""
        return max(self.span)

    @cached_property
    def work(self) -> tuple[float, ...]:
        """Per rank: total duration of its actions."""
        return tuple(sum(self.end[a] - self.start[a] for a in program) for program in self.schedule.programs)

    @cached_property
    def bubble_per_rank(self) -> tuple[float, ...]:
        """Per rank: fraction of `cost` in which it does not compute."""
        return tuple(1 - work / self.cost if self.cost > 0 else 0.0 for work in self.work)

    @cached_property
    def bubble_rate(self) -> float:
        """Idle fraction of `cost`, averaged over the ranks.

        If all ranks have the same work, m micro-batches of F + B + W, this is (cost - m (F + B + W)) / cost as
        https://arxiv.org/abs/2401.10241 defines it in its section on schedule efficiency.
        """
        return sum(self.bubble_per_rank) / self.schedule.ranks

    @cached_property
    def peak_activations(self) -> tuple[int, ...]:
        """Per rank: maximum number of activations in memory, one per stage and micro-batch: F adds one, B or W frees one."""
        change = {Op.F: 1, Op.B: -1, Op.I: 0, Op.W: -1}
        peaks = []
        for program in self.schedule.programs:
            held = peak = 0
            for action in program:
                held += change[action.op]
                peak = max(peak, held)
            peaks.append(peak)
        return tuple(peaks)


def dependencies(action: Action, schedule: Schedule) -> tuple[Action, ...]:
    """Return the actions whose results `action` needs.

    F needs F of the previous stage; B and I need F of their own stage and B or I of the next one; W needs I of its own stage.
    """
    stage, m = action.stage, action.micro_batch
    if action.op is Op.F:
        return (Action(Op.F, stage - 1, m),) if stage else ()
    if action.op is Op.W:
        return (Action(Op.I, stage, m),)
    own = Action(Op.F, stage, m)
    if stage == schedule.stages - 1:
        return (own,)
    alone = Action(Op.I, stage + 1, m)
    return own, alone if alone in schedule.actions else Action(Op.B, stage + 1, m)


def validate(schedule: Schedule) -> None:
    """Check that every stage runs every micro-batch once forward and once backward (B, or I and W), on the stage's rank.

    ValueError names an action that is missing, duplicate or on the wrong rank. Deadlocks are detected by `simulate`.
    """
    if schedule.stages == 0 or set(schedule.placement) != set(range(schedule.ranks)):
        raise ValueError(f"{schedule.name}: placement {schedule.placement} leaves one of {schedule.ranks} ranks out")
    seen: set[Action] = set()
    for rank, program in enumerate(schedule.programs):
        for action in program:
            if not (0 <= action.stage < schedule.stages and 0 <= action.micro_batch < schedule.micro_batches):
                raise ValueError(
                    f"{schedule.name}: rank {rank} runs {action}, but there are {schedule.stages} stages "
                    f"and {schedule.micro_batches} micro-batches"
                )
            owner = schedule.placement[action.stage]
            if owner != rank:
                raise ValueError(f"{schedule.name}: rank {rank} runs {action}, but stage {action.stage} is on rank {owner}")
            if action in seen:
                raise ValueError(f"{schedule.name}: rank {rank} runs {action} twice")
            seen.add(action)
    for stage in range(schedule.stages):
        for m in range(schedule.micro_batches):
            # A backward is whole or split, never both, which would add the weights' gradients twice.
            ran = {op for op in Op if Action(op, stage, m) in seen}
            if ran not in ({Op.F, Op.B}, {Op.F, Op.I, Op.W}):
                names = " ".join(op.value for op in Op if op in ran) or "nothing"
                raise ValueError(
                    f"{schedule.name}: stage {stage} runs {names} for micro-batch {m}; it needs F and B, or F, I and W"
                )


def simulate(schedule: Schedule, costs: CostModel) -> Timeline:
    """Return the timeline, from time 0, on which every action starts as early as possible.

    ValueError when the schedule deadlocks; the message states which ranks wait for which actions.
    """
    start: dict[Action, float] = {}
    end: dict[Action, float] = {}
    position = [0] * schedule.ranks
    free = [0.0] * schedule.ranks
    waiting: dict[Action, list[int]] = {}  # an action that has not run -> the ranks that wait for it
    # The order in which ranks are processed does not affect the times.
    runnable = deque(range(schedule.ranks))
    while runnable:
        rank = runnable.popleft()
        program = schedule.programs[rank]
        while position[rank] < len(program):
            action = program[position[rank]]
            begin = free[rank]
            missing = None
            for needed in dependencies(action, schedule):
                if needed not in end:
                    missing = needed
                    break
                delay = 0.0 if schedule.placement[needed.stage] == rank else costs.communication
                begin = max(begin, end[needed] + delay)
            if missing is not None:
                waiting.setdefault(missing, []).append(rank)
                break
            start[action], end[action] = begin, begin + costs.duration(action)
            free[rank] = end[action]
            position[rank] += 1
            runnable.extend(waiting.pop(action, ()))
    if waiting:
        raise ValueError(_deadlock(schedule, position, waiting))
    return Timeline(schedule, start, end)


def measured_timeline(schedule: Schedule, start: Mapping[Action, float], end: Mapping[Action, float]) -> Timeline:
    """Return the timeline of measured times. Actions that are not in the schedule are ignored.

    Args:
        schedule: the schedule that was run.
        start: start time of each action, in the same unit and on the same clock for all ranks.
        end: end time of each action.

    Raises:
        ValueError: an action of the schedule has no time, or ends before it starts.
    """
    for program in schedule.programs:
        for action in program:
            if action not in start or action not in end:
                raise ValueError(f"{schedule.name}: {action} has no {'end' if action in start else 'start'} time")
            if not start[action] <= end[action]:
                raise ValueError(f"{schedule.name}: {action} ends at {end[action]}, before it starts at {start[action]}")
    actions = schedule.actions
    return Timeline(schedule, {a: start[a] for a in actions}, {a: end[a] for a in actions})


def _deadlock(schedule: Schedule, position: list[int], waiting: Mapping[Action, list[int]]) -> str:
    waits = []
    for missing, ranks in waiting.items():
        where = f"on rank {schedule.placement[missing.stage]}" if missing in schedule.actions else "which no rank runs"
        waits += [(rank, f"rank {rank} at {schedule.programs[rank][position[rank]]} for {missing} {where}") for rank in ranks]
    return f"{schedule.name}: the ranks wait for each other: " + "; ".join(text for _, text in sorted(waits))


def _check_cost(name: str, cost: float) -> None:
    if not (math.isfinite(cost) and cost >= 0):
        raise ValueError(f"cost of {name} is {cost}; it must be a finite time of 0 or more")
