"""A profiled run: what it writes, that its clocks agree, and that it stays the run that it was."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from ranks import on_ranks
from reference import GPT2, Setting, start_run, train_steps

from megatron.pipeline.profile import Recorder
from megatron.pipeline.schedules.schedule import Action, Op, make_schedule
from megatron.pipeline.schedules.simulate import Costs, dependencies, simulate
from megatron.train.pipeline_profile import STEPS, ProfiledStep, align_clocks, measured_costs

# Actions of a millisecond or so, which clocks that were set apart would put out of order.
SETTING = Setting(replace(GPT2, num_layers=5, hidden_size=64), global_batch=6)
TOTAL = STEPS + 2
ROUNDING = 1e-6  # ms


def profile_run(setting: Setting, directory: str, steps: int):
    """Curve of a profiled run, and what it said."""
    run = start_run(setting, steps)
    said: list[str] = []
    plain = run.step
    run.step = ProfiledStep(run, Path(directory), said.append)
    curve = train_steps(run, setting, steps)
    assert type(run.pipeline.recorder) is Recorder, "the stopwatch stays behind"
    run.step = plain
    return curve, said


def plain_run(setting: Setting, steps: int):
    return train_steps(start_run(setting, steps), setting, steps)


def read_profile(directory: Path) -> dict:
    assert sorted(p.name for p in directory.iterdir()) == ["pipeline_profile.json", "pipeline_profile.svg"]
    ElementTree.parse(directory / "pipeline_profile.svg")
    return json.loads((directory / "pipeline_profile.json").read_text())


CASES = [
    ("1f1b", 2, dict(pp=2)),
    ("zb-h1", 4, dict(pp=4)),
    ("zb-v", 4, dict(pp=2, tp=2, sequence_parallel=True)),
    ("gpipe", 4, dict(pp=2)),
]


@pytest.mark.parametrize(("name", "world", "layout"), CASES)
def test_a_profile_records_every_action_and_changes_no_loss(name, world, layout, tmp_path):
    setting = replace(SETTING, schedule=name, **layout)
    results = on_ranks(world, profile_run, setting, str(tmp_path / "profile"), TOTAL)
    assert [len(said) for _, said in results] == [1] + [0] * (world - 1)
    assert name in results[0][1][0] and str(tmp_path / "profile") in results[0][1][0]
    assert [curve for curve, _ in results] == on_ranks(world, plain_run, setting, TOTAL), "profiling changed the run"
    record = read_profile(tmp_path / "profile")
    dp = world // setting.pp // setting.tp
    schedule = make_schedule(name, setting.pp, setting.global_batch // dp)
    assert (record["schedule"], record["micro_batches"]) == (name, schedule.micro_batches)
    assert tuple(record["placement"]) == schedule.placement
    peaks = list(simulate(schedule, Costs()).peak_activations)
    assert record["measured"]["peak_activations"] == record["predicted"]["peak_activations"] == peaks
    assert record["communication_ms"] >= 0.0 and all(cost > 0.0 for cost in record["costs_ms"].values())
    assert set(record["costs_ms"]) == {f"{a.op.value}{a.stage}" for a in schedule.actions}
    for which in ("measured", "predicted"):
        assert 0.0 <= record[which]["bubble_rate"] < 1.0 and record[which]["makespan_ms"] > 0.0
        in_order(record[which]["actions"], schedule)


def in_order(actions: list[dict], schedule) -> None:
    """Every action once, on its rank, in the order of its program, and after all that it needs, on whatever rank."""
    times = {Action(Op(a["op"]), a["stage"], a["micro_batch"]): (a["rank"], a["start"], a["end"]) for a in actions}
    assert len(times) == len(actions) and times.keys() == schedule.actions
    for rank, program in enumerate(schedule.programs):
        free = 0.0
        for action in program:
            where, start, end = times[action]
            assert where == rank and free - ROUNDING <= start <= end
            free = end
    early = {
        f"{action} starts {times[needed][2] - start:.3f} ms before {needed} ends"
        for action, (_, start, _) in times.items()
        for needed in dependencies(action, schedule)
        if start < times[needed][2] - ROUNDING
    }
    assert not early, early


def test_a_short_run_is_profiled_as_well(tmp_path):
    """One step alone, and one process alone."""
    ((_, said),) = [profile_run(SETTING, str(tmp_path / "one"), 1)]
    assert "profile of 1 steps" in said[0]
    assert read_profile(tmp_path / "one")["measured"]["peak_activations"] == [1]


def test_only_some_steps_are_timed(tmp_path):
    """Not the first one, which warms up, and no more than are needed."""
    run = start_run(SETTING, 30)
    step = ProfiledStep(run, tmp_path, lambda line: None)
    assert (step.first, step.last) == (2, 1 + STEPS)


def test_measured_costs_are_medians_and_the_shortest_way():
    schedule = make_schedule("1f1b", 2, 1)
    f0, f1, b1, b0 = Action(Op.F, 0, 0), Action(Op.F, 1, 0), Action(Op.B, 1, 0), Action(Op.B, 0, 0)
    steps = [
        {f0: (0.0, 1.0), f1: (1.5, 3.0), b1: (3.0, 5.0), b0: (5.25, 7.0)},
        {f0: (0.0, 3.0), f1: (4.0, 6.0), b1: (6.0, 9.0), b0: (10.0, 12.0)},
        {f0: (0.0, 9.0), f1: (9.5, 12.0), b1: (12.0, 16.0), b0: (17.0, 20.0)},
    ]
    costs = measured_costs(schedule, steps)
    assert costs.times == {(Op.F, 0): 3.0, (Op.F, 1): 2.0, (Op.B, 1): 3.0, (Op.B, 0): 2.0}
    assert costs.communication == 0.25


@pytest.mark.parametrize(("name", "ranks", "chunks"), [("1f1b", 4, None), ("interleaved", 3, 2), ("zb-v", 3, None)])
def test_clocks_that_were_started_apart_are_set(name, ranks, chunks):
    """Never against what depends on what; and what was possible stays as it was measured."""
    schedule = make_schedule(name, ranks, 5, chunks)
    true = simulate(schedule, Costs(3.0, 3.0, 2.0, communication=0.25))
    spans = {a: (true.start[a], true.end[a]) for a in schedule.actions}
    assert align_clocks(schedule, spans) == spans
    for late in range(ranks):
        clocks = [-1.5 * (rank == late) - 0.125 * rank for rank in range(ranks)]
        wrong = {a: tuple(t + clocks[schedule.placement[a.stage]] for t in span) for a, span in spans.items()}
        got = align_clocks(schedule, wrong)
        assert all(got[a][0] >= got[n][1] - ROUNDING for a in got for n in dependencies(a, schedule))
        assert all(got[a][1] - got[a][0] == pytest.approx(spans[a][1] - spans[a][0]) for a in got)
