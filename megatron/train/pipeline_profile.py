"""Profile the pipeline for `--profile-pipeline`: draw the measured timeline of its actions beside a simulated one.

The actions of a few steps are timed. The simulation runs the same schedule with the median time of each kind of action on each
stage. Where the two drawings differ, the executor or the machine deviated from the schedule.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch.distributed as dist

from megatron.contract import Batch
from megatron.files.pending import write_whole
from megatron.files.side import warning_on_error
from megatron.mesh.mesh import Mesh
from megatron.pipeline.executor import Executor
from megatron.pipeline.profile import Recorder, Stopwatch
from megatron.pipeline.schedules.draw import Panel, draw_svg
from megatron.pipeline.schedules.schedule import Action, Op, Schedule
from megatron.pipeline.schedules.simulate import MeasuredCosts, Timeline, measured_timeline, simulate
from megatron.train.report import StepReport
from megatron.train.run import Run
from megatron.train.state import TrainState

STEPS = 5  # number of steps that are timed, after the first step of a run, which is slower
NAME = "pipeline_profile"  # of the files, without suffix

Spans = dict[Action, tuple[float, float]]  # start and end of each action of a step


class ProfiledStep:
    """Wraps a run's step, and times the actions of a few calls; the last of these writes the profile.

    Args:
        run: the run whose step is wrapped.
        directory: the directory that the profile is written to.
        log: prints a line about the profile, on the first rank.
    """

    def __init__(self, run: Run, directory: Path, log: Callable[[str], None]) -> None:
        self.step, self.pipeline, self.mesh = run.step, run.pipeline, run.mesh
        self.directory, self.log = directory, log
        batch, iteration = run.config.batch, run.state.iteration
        left = batch.iterations - iteration  # steps until the process ends
        if batch.exit_interval is not None:
            left = min(left, batch.exit_interval - iteration % batch.exit_interval)
        # The first and the last call to time: from the second on, since the first is slower, unless there is only one.
        self.first, self.last = min(2, left), min(1 + STEPS, left)
        self.calls = 0
        self.timed: list[tuple[int, Spans, int]] = []  # micro-batches, spans, peak number of micro-batches in flight

    def __call__(self, batches: Sequence[Batch], state: TrainState) -> StepReport:
        self.calls += 1
        if not self.first <= self.calls <= self.last:
            return self.step(batches, state)
        with timed_actions(self.pipeline, self.mesh) as stopwatch:
            report = self.step(batches, state)
        self.timed.append((len(batches), stopwatch.spans(), self.pipeline.peak_in_flight))
        if self.calls == self.last:  # the same call on all ranks, since writing is collective
            self._write()
        return report

    def _write(self) -> None:
        """Write the profile of the timed steps that had as many micro-batches as the last one. Collective."""
        count = self.timed[-1][0]
        # The batch size, and with it the schedule, may change between the timed steps.
        alike = [(spans, peak) for micro_batches, spans, peak in self.timed if micro_batches == count]
        by_rank = gather_over_pipeline(self.mesh, alike)
        self.timed.clear()
        if by_rank is None:
            return
        steps = [{a: span for spans, _ in ranks for a, span in spans.items()} for ranks in zip(*by_rank, strict=True)]
        peaks = [max(peak for _, peak in rank) for rank in by_rank]
        with warning_on_error(self.directory, "the profile of the pipeline cannot be written"):
            write_profile(self.directory, self.pipeline.schedule(count), steps, peaks, self.log)


@contextmanager
def timed_actions(pipeline: Executor, mesh: Mesh) -> Iterator[Stopwatch]:
    """Time the executor's actions inside the block. Collective: the ranks of a pipeline start together."""
    if mesh.pp.group is not None:
        dist.barrier(group=mesh.pp.group)
    pipeline.recorder = stopwatch = Stopwatch(pipeline.device)
    try:
        yield stopwatch
    finally:
        pipeline.recorder = Recorder()


def gather_over_pipeline(mesh: Mesh, value: Any) -> list[Any] | None:
    """Return the values of the ranks that share a pipeline with rank 0, on rank 0; None on all other ranks. Collective."""
    if mesh.pp.group is None:
        return [value] if mesh.rank == 0 else None
    values: list[Any] | None = [None] * mesh.pp.size if mesh.pp.first else None
    dist.gather_object(value, values, dst=mesh.pp.ranks[0], group=mesh.pp.group)
    return values if mesh.rank == 0 else None


def measured_costs(schedule: Schedule, steps: Sequence[Spans]) -> MeasuredCosts:
    """Return the median time of each kind of action on each stage, and the shortest transfer time between two ranks."""
    times: defaultdict[tuple[Op, int], list[float]] = defaultdict(list)
    for spans in steps:
        for action, (start, end) in spans.items():
            times[action.op, action.stage].append(end - start)
    gaps = [gap for spans in steps for _, _, gap in _gaps(schedule, spans)]
    # The shortest gap estimates the time of a transfer, since longer gaps include waiting for other actions.
    return MeasuredCosts({kind: median(taken) for kind, taken in times.items()}, max(0.0, min(gaps, default=0.0)))


def align_clocks(schedule: Schedule, spans: Spans) -> Spans:
    """Convert the spans of all ranks to one clock, on which no action starts before its input was computed.

    The ranks start their stopwatches when they leave a barrier, up to a few milliseconds apart, so an action may seem to start
    before its input was sent. The clock of the receiving rank is then shifted forward by the least amount that avoids this.
    """
    min_gaps: dict[tuple[int, int], float] = {}
    for sender, receiver, gap in _gaps(schedule, spans):
        min_gaps[sender, receiver] = min(gap, min_gaps.get((sender, receiver), gap))
    shifts = [0.0] * schedule.ranks
    for _ in range(schedule.ranks):  # a shift of one rank may require shifts of the ranks that it sends to
        for (sender, receiver), gap in min_gaps.items():
            shifts[receiver] = max(shifts[receiver], shifts[sender] - gap)
    shift = {action: shifts[schedule.placement[action.stage]] for action in spans}
    return {action: (start + shift[action], end + shift[action]) for action, (start, end) in spans.items()}


def _gaps(schedule: Schedule, spans: Spans) -> Iterator[tuple[int, int, float]]:
    """Yield sender, receiver, and the time from the end of an action to the start of the action that needs its result."""
    for action, (start, _) in spans.items():
        if action.op is Op.W:  # the weight gradient needs no result of another rank
            continue
        needed = action.stage - 1 if action.op is Op.F else action.stage + 1
        if not 0 <= needed < schedule.stages or schedule.placement[needed] == schedule.placement[action.stage]:
            continue
        needed_span = spans.get(Action(action.op, needed, action.micro_batch))
        if needed_span is not None:
            yield schedule.placement[needed], schedule.placement[action.stage], start - needed_span[1]


def write_profile(
    directory: Path, schedule: Schedule, steps: Sequence[Spans], peaks: Sequence[int], log: Callable[[str], None]
) -> None:
    """Write a profile, in milliseconds: a drawing, and a JSON file with its figures.

    Args:
        directory: the directory of `pipeline_profile.svg` and `pipeline_profile.json`.
        schedule: the schedule that was run.
        steps: spans of the timed steps, in seconds; the step of median duration is drawn.
        peaks: maximum number of micro-batches in flight, by pipeline rank.
        log: prints a line about the profile.
    """
    steps = [
        align_clocks(schedule, {a: (1000.0 * start, 1000.0 * end) for a, (start, end) in spans.items()}) for spans in steps
    ]
    timelines = sorted((_timeline(schedule, spans) for spans in steps), key=lambda timeline: timeline.makespan)
    measured = timelines[len(timelines) // 2]  # of the step with the median duration
    costs = measured_costs(schedule, steps)
    predicted = simulate(schedule, costs)
    directory.mkdir(parents=True, exist_ok=True)
    panels = [Panel("measured, ms", schedule, measured), Panel("predicted from the measured actions, ms", schedule, predicted)]
    write_whole(directory / f"{NAME}.svg", draw_svg(panels))
    record = {
        "schedule": schedule.name,
        "micro_batches": schedule.micro_batches,
        "placement": schedule.placement,
        "costs_ms": {f"{op.value}{stage}": time for (op, stage), time in sorted(costs.times.items(), key=str)},
        "communication_ms": costs.communication,
        "measured": _figures(measured) | {"peak_activations": list(peaks), "actions": _actions(measured)},
        "predicted": _figures(predicted) | {"actions": _actions(predicted)},
    }
    write_whole(directory / f"{NAME}.json", json.dumps(record, indent=1) + "\n")
    log(
        f"pipeline profile of {len(steps)} steps, {schedule.name}: {measured.makespan:.1f} ms with {measured.bubble_rate:.1%} "
        f"bubble, predicted {predicted.makespan:.1f} ms with {predicted.bubble_rate:.1%}: {directory / f'{NAME}.svg'}"
    )


def _timeline(schedule: Schedule, spans: Spans) -> Timeline:
    return measured_timeline(schedule, {a: s for a, (s, _) in spans.items()}, {a: e for a, (_, e) in spans.items()})


def _figures(timeline: Timeline) -> dict[str, Any]:
    return {
        "makespan_ms": timeline.makespan,
        "bubble_rate": timeline.bubble_rate,
        "bubble_per_rank": list(timeline.bubble_per_rank),
        "peak_activations": list(timeline.peak_activations),
    }


def _actions(timeline: Timeline) -> list[dict[str, Any]]:
    """Return every action with its rank, start and end, for the JSON file."""
    return [
        {**asdict(action), "op": action.op.value, "rank": rank, "start": timeline.start[action], "end": timeline.end[action]}
        for rank, program in enumerate(timeline.schedule.programs)
        for action in program
    ]
