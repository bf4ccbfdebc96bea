"""Schedules as data: complete, without deadlock, in one order of micro-batches, for any number of ranks and micro-batches."""

from __future__ import annotations

import pytest

from megatron.pipeline.schedules.schedule import SCHEDULES, Op, Schedule, looped, make_schedule, v_shaped
from megatron.pipeline.schedules.simulate import Costs, simulate, validate


def programs(schedule: Schedule) -> list[str]:
    return [" ".join(map(str, program)) for program in schedule.programs]


def everywhere(name: str, ranks: range, micro_batches: range):
    """Schedules of one kind for all of these; with 1 to 4 chunks where they are free."""
    chunks = [1, 2, 3, 4] if SCHEDULES[name].chunks is None else [None]
    for p in ranks:
        for m in micro_batches:
            yield from (make_schedule(name, p, m, v) for v in chunks)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_is_complete_and_runs_to_its_end(name):
    """Fewer micro-batches than ranks, one rank, and numbers that do not divide each other are among these."""
    for schedule in everywhere(name, range(1, 8), range(1, 18)):
        validate(schedule)
        timeline = simulate(schedule, Costs(1.3, 0.9, 0.8, 0.1))
        assert set(timeline.end) == schedule.actions


@pytest.mark.parametrize("name", SCHEDULES)
def test_stages_take_micro_batches_in_order(name):
    """So that gradients are added up in the same order by every schedule."""
    for schedule in everywhere(name, range(1, 7), range(1, 15)):
        taken: dict[tuple[Op, int], int] = {}
        for program in schedule.programs:
            for action in program:
                kind = (action.op, action.stage)
                assert action.micro_batch == taken.get(kind, 0), f"{schedule.name} {programs(schedule)}"
                taken[kind] = action.micro_batch + 1
        assert set(taken.values()) == {schedule.micro_batches}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_kind_tells_what_its_schedules_are(name):
    kind = SCHEDULES[name]
    for schedule in everywhere(name, range(1, 5), range(1, 6)):
        chunks = schedule.stages // schedule.ranks
        assert (schedule.name, kind.chunks or chunks) == (name, chunks)
        assert schedule.placement == kind.place(schedule.ranks, chunks)
        backward = {action.op for action in schedule.actions} - {Op.F}
        assert backward == ({Op.I, Op.W} if kind.splits else {Op.B})


def test_gpipe_and_1f1b():
    assert programs(make_schedule("gpipe", 2, 2)) == ["F0.0 F0.1 B0.0 B0.1", "F1.0 F1.1 B1.0 B1.1"]
    assert programs(make_schedule("1f1b", 3, 4)) == [
        "F0.0 F0.1 F0.2 B0.0 F0.3 B0.1 B0.2 B0.3",
        "F1.0 F1.1 B1.0 F1.2 B1.1 F1.3 B1.2 B1.3",
        "F2.0 B2.0 F2.1 B2.1 F2.2 B2.2 F2.3 B2.3",
    ]


def test_interleaved_takes_groups_of_micro_batches_through_its_chunks():
    assert programs(make_schedule("interleaved", 2, 4, 2)) == [
        "F0.0 F0.1 F2.0 F2.1 F0.2 B2.0 F0.3 B2.1 F2.2 B0.0 F2.3 B0.1 B2.2 B2.3 B0.2 B0.3",
        "F1.0 F1.1 F3.0 B3.0 F3.1 B3.1 F1.2 B1.0 F1.3 B1.1 F3.2 B3.2 F3.3 B3.3 B1.2 B1.3",
    ]


def test_interleaved_with_a_smaller_last_group():
    """Three micro-batches on two ranks: the program of four without the fourth."""
    assert programs(make_schedule("interleaved", 2, 3, 2)) == [
        "F0.0 F0.1 F2.0 F2.1 F0.2 B2.0 B2.1 F2.2 B0.0 B0.1 B2.2 B0.2",
        "F1.0 F1.1 F3.0 B3.0 F3.1 B3.1 F1.2 B1.0 B1.1 F3.2 B3.2 B1.2",
    ]


@pytest.mark.parametrize("micro_batches", [1, 3, 4, 9])
def test_interleaved_with_one_chunk_is_1f1b(micro_batches):
    assert make_schedule("interleaved", 4, micro_batches, 1).programs == make_schedule("1f1b", 4, micro_batches).programs


def test_zb_h1_keeps_as_many_weight_gradients_back_as_ranks_stand_in_front():
    assert programs(make_schedule("zb-h1", 3, 4)) == [
        "F0.0 F0.1 F0.2 I0.0 W0.0 F0.3 I0.1 W0.1 I0.2 W0.2 I0.3 W0.3",
        "F1.0 F1.1 I1.0 F1.2 I1.1 W1.0 F1.3 I1.2 W1.1 I1.3 W1.2 W1.3",
        "F2.0 I2.0 F2.1 I2.1 F2.2 I2.2 W2.0 F2.3 I2.3 W2.1 W2.2 W2.3",
    ]


def test_zb_h2_stands_twice_as_far_apart():
    assert programs(make_schedule("zb-h2", 2, 4)) == [
        "F0.0 F0.1 F0.2 I0.0 W0.0 F0.3 I0.1 W0.1 I0.2 W0.2 I0.3 W0.3",
        "F1.0 I1.0 F1.1 I1.1 F1.2 I1.2 W1.0 F1.3 I1.3 W1.1 W1.2 W1.3",
    ]


def test_zb_v_goes_down_the_ranks_and_back_up():
    schedule = make_schedule("zb-v", 2, 3)
    assert schedule.placement == (0, 1, 1, 0)
    assert programs(schedule) == [
        "F0.0 F0.1 F0.2 F3.0 I3.0 W3.0 F3.1 I3.1 W3.1 I0.0 W0.0 F3.2 I3.2 W3.2 I0.1 W0.1 I0.2 W0.2",
        "F1.0 F2.0 F1.1 F2.1 I2.0 W2.0 F1.2 I1.0 W1.0 F2.2 I2.1 W2.1 I1.1 I2.2 I1.2 W1.1 W2.2 W1.2",
    ]


def test_stages_lie_looped_or_in_a_v():
    assert looped(3, 2) == (0, 1, 2, 0, 1, 2)
    assert v_shaped(3) == (0, 1, 2, 2, 1, 0)
    assert make_schedule("zb-v", 3, 1).chunk == (0, 0, 0, 1, 1, 1)
    assert make_schedule("interleaved", 2, 1, 3).chunk == (0, 0, 1, 1, 2, 2)


def test_the_number_of_chunks_has_a_default():
    assert [make_schedule(name, 2, 2).stages for name in SCHEDULES] == [2, 2, 4, 2, 2, 4]
    assert make_schedule("zb-v", 2, 2, 2) == make_schedule("zb-v", 2, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("1f2b", 2, 2), "unknown schedule 1f2b; known are gpipe, 1f1b, interleaved, zb-h1, zb-h2, zb-v"),
        (("1f1b", 0, 2), "1f1b needs at least 1 of pipeline ranks, not 0"),
        (("zb-v", 2, 0), "zb-v needs at least 1 of micro-batches, not 0"),
        (("interleaved", 2, 2, 0), "interleaved needs at least 1 of chunks per rank, not 0"),
        (("1f1b", 2, 2, 2), "1f1b has chunks per rank: 1, not 2; leave chunks out, or take interleaved"),
        (("zb-v", 2, 2, 1), "zb-v has chunks per rank: 2, not 1; leave chunks out, or take interleaved"),
    ],
)
def test_what_cannot_be_made_is_refused(arguments, message):
    with pytest.raises(ValueError) as raised:
        make_schedule(*arguments)
    assert str(raised.value) == message
