"""The simulator against closed forms, against published bubble rates, and against schedules that are wrong on purpose."""

from __future__ import annotations

import itertools
import time

import pytest

from megatron.pipeline.schedules.schedule import SCHEDULES, Action, Op, Schedule, looped, make_schedule
from megatron.pipeline.schedules.simulate import Costs, MeasuredCosts, dependencies, measured_timeline, simulate, validate

UNEQUAL = [Costs(1, 1, 1), Costs(1, 2, 0.5), Costs(3, 2, 1.5), Costs(2, 2.5, 2), Costs(0.7, 0.6, 0.1)]
PROFILED = Costs(18.522, 18.086, 9.337, 0.601)  # milliseconds


def total(costs: Costs) -> float:
    return costs.forward + costs.backward + costs.weight


def action(text: str) -> Action:
    """F1.3 -> the forward of micro-batch 3 on stage 1."""
    stage, m = text[1:].split(".")
    return Action(Op(text[0]), int(stage), int(m))


def schedule_from_text(*programs: str, micro_batches: int = 1) -> Schedule:
    return Schedule("test", micro_batches, looped(len(programs), 1), tuple(tuple(map(action, p.split())) for p in programs))


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
def test_the_bubble_of_gpipe_and_1f1b(name):
    for p, m, costs in itertools.product([1, 2, 3, 4, 8], [1, 2, 3, 4, 7, 8, 16], UNEQUAL):
        timeline = simulate(make_schedule(name, p, m), costs)
        assert timeline.bubble_rate == pytest.approx((p - 1) / (m + p - 1), abs=1e-12), (p, m, costs)
        assert timeline.makespan == pytest.approx((m + p - 1) * total(costs))


def test_the_bubble_of_interleaved():
    for p, groups, v, costs in itertools.product([1, 2, 3, 4, 8], [1, 2, 4], [1, 2, 3, 5], UNEQUAL):
        m = groups * p
        timeline = simulate(make_schedule("interleaved", p, m, v), costs)
        assert timeline.bubble_rate == pytest.approx((p - 1) / (v * m + p - 1), abs=1e-12), (p, m, v, costs)


@pytest.mark.parametrize(("name", "weights", "enough"), [("zb-h1", 1, lambda p: p), ("zb-h2", 2, lambda p: 2 * p - 1)])
def test_the_idle_time_of_zb_h1_and_zb_h2(name, weights, enough):
    """(p - 1) (F + B - W) and (p - 1) (F + B - 2 W), where W is no longer than F or B and there are micro-batches enough."""
    for p, more, costs in itertools.product([1, 2, 3, 4, 8], [0, 1, 9], UNEQUAL):
        m = enough(p) + more
        timeline = simulate(make_schedule(name, p, m), costs)
        idle = (p - 1) * (costs.forward + costs.backward - weights * costs.weight)
        assert timeline.cost - m * total(costs) == pytest.approx(idle, abs=1e-9), (p, m, costs)
        assert timeline.bubble_rate == pytest.approx(idle / timeline.cost, abs=1e-12)


def test_zb_v_has_no_bubble():
    for p in range(1, 10):
        for m in (2 * p - 1, 2 * p, 2 * p + 1, 5 * p):
            timeline = simulate(make_schedule("zb-v", p, m), Costs())
            assert timeline.bubble_rate == pytest.approx(0, abs=1e-12), (p, m)
            assert timeline.cost == 6 * m
            assert timeline.makespan == 6 * m + p - 1  # only the way to the last rank


def test_zb_v_is_never_behind_zb_h1():
    """With one chunk's half of the work per action, also where there are too few micro-batches for no bubble at all."""
    for p, m in itertools.product(range(1, 9), range(1, 20)):
        v, h1 = simulate(make_schedule("zb-v", p, m), Costs(0.5, 0.5, 0.5)), simulate(make_schedule("zb-h1", p, m), Costs())
        assert v.cost <= h1.cost + 1e-9, (p, m)


# p, m, then milliseconds of F, B, W and communication as profiled, then rates of 1F1B, ZB-H1 and ZB-H2 as published.
PUBLISHED = [
    (8, 24, PROFILED, (0.2431, 0.1585, 0.1083)),
    (8, 32, Costs(18.513, 18.086, 9.331, 0.626), (0.1985, 0.1242, 0.0837)),
    (8, 64, Costs(18.546, 18.097, 9.321, 0.762), (0.1240, 0.0674, 0.0444)),
    (8, 24, Costs(29.718, 29.444, 19.927, 0.527), (0.2347, 0.1323, 0.0698)),
    (8, 32, Costs(29.802, 29.428, 19.530, 0.577), (0.1898, 0.1045, 0.0559)),
    (8, 64, Costs(29.935, 29.621, 19.388, 0.535), (0.1091, 0.0554, 0.0294)),
    (16, 48, Costs(11.347, 11.248, 8.132, 0.377), (0.2552, 0.1397, 0.0672)),
    (16, 64, Costs(11.307, 11.254, 8.101, 0.379), (0.2082, 0.1088, 0.0516)),
    (16, 128, Costs(11.325, 11.308, 8.109, 0.378), (0.1251, 0.0576, 0.0266)),
]


@pytest.mark.parametrize(("p", "m", "costs", "rates"), PUBLISHED)
def test_published_bubble_rates(p, m, costs, rates):
    """The table of bubble rates of arXiv 2401.10241, from its table of profiled times, to its four digits."""
    found = [simulate(make_schedule(name, p, m), costs).bubble_rate for name in ("1f1b", "zb-h1", "zb-h2")]
    assert tuple(round(rate, 4) for rate in found) == rates


def test_peak_activations():
    for p, m in itertools.product([1, 2, 3, 4, 8], [1, 2, 3, 5, 8, 16, 20]):
        ranks = range(p)
        peaks = {name: simulate(make_schedule(name, p, m), PROFILED).peak_activations for name in SCHEDULES}
        assert peaks["gpipe"] == (m,) * p
        assert peaks["1f1b"] == tuple(min(m, p - r) for r in ranks)
        assert peaks["zb-h1"] == (min(m, p),) * p
        assert peaks["zb-h2"] == (min(m, 2 * p - 1),) * p
        assert max(peaks["zb-v"]) <= min(2 * m, 2 * p)
        if m >= 2 * p:
            assert peaks["zb-v"] == (2 * p,) * p


def test_peak_activations_of_interleaved():
    """Megatron-LM's warm-up, 2 (p - 1 - r) + (v - 1) p, and the one at work; no more than there are."""
    for p, groups, v in itertools.product([1, 2, 4, 8], [1, 2, 3], [2, 3, 4]):
        peaks = simulate(make_schedule("interleaved", p, groups * p, v), PROFILED).peak_activations
        assert peaks == tuple(min(v * groups * p, 2 * (p - 1 - r) + (v - 1) * p + 1) for r in range(p))


def test_times_of_a_small_step():
    schedule = schedule_from_text("F0.0 B0.0", "F1.0 I1.0 W1.0")
    timeline = simulate(schedule, Costs(1, 2, 4, 0.5))
    assert {str(a): (timeline.start[a], timeline.end[a]) for a in schedule.actions} == {
        "F0.0": (0, 1),
        "F1.0": (1.5, 2.5),
        "I1.0": (2.5, 4.5),
        "W1.0": (4.5, 8.5),
        "B0.0": (5, 11),
    }
    assert (timeline.makespan, timeline.span, timeline.cost, timeline.work) == (11, (11, 7), 11, (7, 7))
    assert timeline.bubble_per_rank == pytest.approx((4 / 11, 4 / 11))
    assert timeline.bubble_rate == pytest.approx(4 / 11)


def test_communication_takes_no_time_on_one_rank():
    """The two stages in the middle of zb-v share the last rank."""
    timeline = simulate(make_schedule("zb-v", 2, 1), Costs(1, 1, 1, 10))
    start = {str(a): at for a, at in timeline.start.items()}
    assert (start["F1.0"], start["F2.0"], start["F3.0"], start["I3.0"]) == (11, 12, 23, 24)


def test_measured_costs_differ_between_stages():
    times = {(Op.F, 0): 1.0, (Op.B, 0): 2.0, (Op.F, 1): 3.0, (Op.B, 1): 4.0}
    timeline = simulate(make_schedule("1f1b", 2, 3), MeasuredCosts(times, communication=0.0))
    assert timeline.work == (9, 21)
    assert timeline.makespan == 1 + 21 + 2
    assert timeline.bubble_per_rank == pytest.approx((15 / 24, 3 / 24))
    assert timeline.bubble_rate == pytest.approx(9 / 24)
    with pytest.raises(ValueError, match="no time was measured for F of stage 2"):
        simulate(make_schedule("1f1b", 3, 3), MeasuredCosts(times))


def test_a_measurement_is_read_like_a_simulation():
    schedule = make_schedule("zb-h1", 3, 5)
    made = simulate(schedule, PROFILED)
    moved = measured_timeline(schedule, {a: t + 1e3 for a, t in made.start.items()}, {a: t + 1e3 for a, t in made.end.items()})
    assert (made.origin, moved.origin) == (0, 1000)
    assert moved.makespan == pytest.approx(made.makespan)
    assert moved.bubble_rate == pytest.approx(made.bubble_rate)
    assert moved.peak_activations == made.peak_activations


def test_a_measurement_with_holes_is_refused():
    schedule = schedule_from_text("F0.0 B0.0")
    start, end = {action("F0.0"): 0.0, action("B0.0"): 1.0}, {action("F0.0"): 1.0, action("B0.0"): 2.0}
    assert measured_timeline(schedule, start, end).makespan == 2
    with pytest.raises(ValueError, match=r"B0\.0 has no start time"):
        measured_timeline(schedule, {action("F0.0"): 0.0}, end)
    with pytest.raises(ValueError, match=r"B0\.0 has no end time"):
        measured_timeline(schedule, start, {action("F0.0"): 1.0})
    with pytest.raises(ValueError, match=r"B0\.0 ends at 0\.5, before it starts at 1\.0"):
        measured_timeline(schedule, start, {**end, action("B0.0"): 0.5})


def test_actions_depend_on_their_neighbours():
    whole, split = make_schedule("1f1b", 3, 2), make_schedule("zb-h1", 3, 2)

    def needs(text, schedule):
        return " ".join(map(str, dependencies(action(text), schedule)))

    assert needs("F0.1", whole) == ""
    assert needs("F2.1", whole) == "F1.1"
    assert needs("B1.1", whole) == "F1.1 B2.1"
    assert needs("B2.0", whole) == "F2.0"
    assert needs("I1.1", split) == "F1.1 I2.1"
    assert needs("W1.1", split) == "I1.1"


@pytest.mark.parametrize(
    ("programs", "message"),
    [
        (("F0.0 B0.0", "F1.0"), "stage 1 runs F for micro-batch 0; it needs F and B, or F, I and W"),
        (("F0.0 I0.0", "F1.0 B1.0"), "stage 0 runs F I for micro-batch 0"),
        (("F0.0 B0.0 W0.0", "F1.0 B1.0"), "stage 0 runs F B W for micro-batch 0"),
        (("F0.0 B0.0", ""), "stage 1 runs nothing for micro-batch 0"),
        (("F0.0 B0.0 F0.0", "F1.0 B1.0"), "rank 0 runs F0.0 twice"),
        (("F0.0 B0.0 F1.0", "B1.0"), "rank 0 runs F1.0, but stage 1 is on rank 1"),
        (("F0.0 B0.0", "F1.0 B1.0 F1.1"), "rank 1 runs F1.1, but there are 2 stages and 1 micro-batches"),
    ],
)
def test_wrong_schedules_are_refused(programs, message):
    with pytest.raises(ValueError) as raised:
        validate(schedule_from_text(*programs))
    assert message in str(raised.value)


def test_a_placement_must_use_every_rank():
    with pytest.raises(ValueError, match="leaves one of 2 ranks out"):
        validate(Schedule("test", 1, (0, 0), ((), ())))


def test_a_deadlock_names_what_waits_for_what():
    with pytest.raises(ValueError) as raised:
        simulate(schedule_from_text("F0.0 B0.0 F0.1 B0.1", "F1.0 F1.1 B1.0 B1.1", micro_batches=2), Costs())
    assert str(raised.value) == (
        "test: the ranks wait for each other: rank 0 at B0.0 for B1.0 on rank 1; rank 1 at F1.1 for F0.1 on rank 0"
    )
    with pytest.raises(ValueError, match=r"rank 0 at B0\.0 for B1\.0 which no rank runs"):
        simulate(schedule_from_text("F0.0 B0.0", "F1.0"), Costs())


@pytest.mark.parametrize("cost", [-1.0, float("nan"), float("inf")])
def test_costs_that_are_no_times_are_refused(cost):
    with pytest.raises(ValueError, match="cost of weight is"):
        Costs(1, 1, cost)
    with pytest.raises(ValueError, match="cost of B of stage 3 is"):
        MeasuredCosts({(Op.B, 3): cost})


def test_free_actions_have_no_bubble():
    assert simulate(make_schedule("1f1b", 2, 2), Costs(0, 0, 0)).bubble_rate == 0


def test_large_schedules_are_quick():
    """49152 actions take a fraction of a second; anything quadratic in them would take minutes."""
    before = time.process_time()
    simulate(make_schedule("zb-v", 32, 256), Costs()).bubble_rate  # noqa: B018
    assert time.process_time() - before < 5
