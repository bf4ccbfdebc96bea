"""Profile the pipeline for `--profile-pipeline`: draw its measured timeline beside the timeline that the simulator predicts.

The actions of a few steps are timed. The prediction simulates the same schedule, with the median time of each kind of action on
each stage. Where the two drawings differ, the executor or the machine deviated from the schedule.
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

STEPS = 5  # number of timed steps; the first step of a run, which is slower, is not among them
NAME = "pipeline_profile"

Spans = dict[Action, tuple[float, float]]  # start and end of each action


class ProfiledStep:
    """Wraps a run's step: times the actions of some calls, and then writes the profile.

    Args:
        run: the run whose step is wrapped.
        directory: the directory of the profile.
        log: prints a line about the profile, on the first rank.
    """

    def __init__(self, run: Run, directory: Path, log: Callable[[str], None]) -> None:
        self.step, self.pipeline, self.mesh = run.step, run.pipeline, run.mesh
        self.directory, self.log = directory, log
        batch, done = run.config.batch, run.state.iteration
        left = batch.iterations - done
        if batch.exit_interval is not None:
            left = min(left, batch.exit_interval - done % batch.exit_interval)
        # From the second step on, since the first one is slower; a run of only one step times that.
        self.first, self.last = min(2, left), min(1 + STEPS, left)
        self.calls = 0
        self.timed: list[tuple[int, Spans, int]] = []

    def __call__(self, batches: Sequence[Batch], state: TrainState) -> StepReport:
        self.calls += 1
        if not self.first <= self.calls <= self.last:
            return self.step(batches, state)
        with stopwatch(self.pipeline, self.mesh) as watch:
            report = self.step(batches, state)
        self.timed.append((len(batches), watch.spans(), self.pipeline.peak_in_flight))
        if self.calls == self.last:  # the same call on all ranks, since writing is collective
            self._write()
        return report

    def _write(self) -> None:
        """Write the profile of the timed steps that had as many micro-batches as the last one. Collective."""
        count = self.timed[-1][0]
        # The batch size, and with it the schedule, may change between the timed steps.
        alike = [(spans, peak) for micro_batches, spans, peak in self.timed if micro_batches == count]
        everywhere = gather_over_pipeline(self.mesh, alike)
        self.timed.clear()
        if everywhere is None:
            return
        steps = [{a: span for spans, _ in ranks for a, span in spans.items()} for ranks in zip(*everywhere, strict=True)]
        peaks = [max(peak for _, peak in rank) for rank in everywhere]
        with warning_on_error(self.directory, "the profile of the pipeline cannot be written"):
            write_profile(self.directory, self.pipeline.schedule(count), steps, peaks, self.log)


@contextmanager
def stopwatch(pipeline: Executor, mesh: Mesh) -> Iterator[Stopwatch]:
    """Time the executor's actions inside the block. Collective: the ranks of a pipeline start together."""
    if mesh.pp.group is not None:
        dist.barrier(group=mesh.pp.group)
    pipeline.recorder = watch = Stopwatch(pipeline.device)
    try:
        yield watch
    finally:
        pipeline.recorder = Recorder()


def gather_over_pipeline(mesh: Mesh, value: Any) -> list[Any] | None:
    """Return the values of all ranks of rank 0's pipeline, on rank 0; None on all others. Collective."""
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
    # The shortest gap estimates the transfer alone, since longer gaps include waiting for other work.
    return MeasuredCosts({kind: median(taken) for kind, taken in times.items()}, max(0.0, min(gaps, default=0.0)))


def align_clocks(schedule: Schedule, spans: Spans) -> Spans:
    """Return the spans on one clock: no action starts before what it needs has ended.

    The ranks' stopwatches start as they leave a barrier, up to some milliseconds apart, so that an action can seem to start
    before its input was sent. The clock of the receiving rank is then shifted forward, by the least amount that avoids this.
    """
    min_gaps: dict[tuple[int, int], float] = {}
    for sender, receiver, gap in _gaps(schedule, spans):
        min_gaps[sender, receiver] = min(gap, min_gaps.get((sender, receiver), gap))
    shifts = [0.0] * schedule.ranks
    for _ in range(schedule.ranks):  # shifting one rank may require a shift of those that it sends to
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
    """Write the drawing and the figures of a profile, in milliseconds.

    Args:
        directory: where `pipeline_profile.svg` and `.json` are written.
        schedule: the schedule that was run.
        steps: spans of the timed steps, in seconds; the step of median duration is drawn.
        peaks: maximum number of micro-batches in flight, by pipeline rank.
        log: prints a line about the profile.
    """
    steps = [
        align_clocks(schedule, {a: (1000.0 * start, 1000.0 * end) for a, (start, end) in spans.items()}) for spans in steps
    ]
    runs = sorted((_timeline(schedule, spans) for spans in steps), key=lambda run: run.makespan)
    measured = runs[len(runs) // 2]  # the median step
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
