"""Waits that a pipeline on GPUs survives: any the first time and under blocking launches, any one later."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from gpu_waits import Device, Programs, stuck, unsafe_transfers

from megatron.pipeline.schedules.lower import Instruction, Receive, forward_only, lower
from megatron.pipeline.schedules.schedule import SCHEDULES, Action, Schedule, make_schedule

RANKS, MICRO_BATCHES = range(2, 9), range(1, 17)
EVERY = Device(whole=lambda rank, action: True)


def schedules(name: str, ranks: range = RANKS, micro_batches: range = MICRO_BATCHES) -> Iterator[Schedule]:
    """Training in all sizes, and in some the forward passes alone."""
    for p in ranks:
        for m in micro_batches:
            for v in (2, 3) if SCHEDULES[name].chunks is None else (None,):  # interleaved with one chunk is 1f1b
                schedule = make_schedule(name, p, m, v)
                yield schedule
                if m % 8 == 3:
                    yield forward_only(schedule)


def move_receives(programs: Programs, by: int) -> Programs:
    """Every receive `by` actions earlier, whatever its sender waits for."""
    found: Programs = []
    for items in programs:
        at = [i for i, item in enumerate(items) if isinstance(item, Action)]
        places: dict[int, list[Instruction]] = {}
        for i, item in enumerate(items):
            before = sum(place < i for place in at)
            place = at[max(0, before - by)] if isinstance(item, Receive) and at else i
            places.setdefault(place, []).append(item) if place == i else places.setdefault(place, []).insert(0, item)
        found.append([item for place in sorted(places) for item in places[place]])
    return found


def words(schedule: Schedule) -> str:
    return f"{schedule.ranks} ranks, {schedule.micro_batches} micro-batches, {schedule.stages} stages"


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_first_time_every_call_may_block(name):
    for schedule in schedules(name):
        assert not stuck(lower(schedule, early=0), Device(blocking=True)), words(schedule)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_first_time_every_action_may_wait_for_its_device(name):
    for schedule in schedules(name, range(2, 9, 3), range(1, 17, 4)):
        for eager in (False, True):
            assert not stuck(lower(schedule, early=0), Device(whole=EVERY.whole, eager=eager)), words(schedule)


@pytest.mark.parametrize("name", SCHEDULES)
def test_later_any_one_action_may_wait_for_its_device(name):
    for schedule in schedules(name):
        assert not unsafe_transfers(schedule, lower(schedule)), words(schedule)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("by", [0, 1])
def test_the_rule_is_what_the_model_does(name, by):
    """Each action waits in turn. Receives that are moved ahead get some stuck, and the rule says of which schedules."""
    for schedule in schedules(name, range(2, 4), range(1, 7, 2)):
        programs = move_receives(lower(schedule, early=2), by)
        actions = [(rank, action) for rank, program in enumerate(schedule.programs) for action in program]
        hang = [one for one in actions if stuck(programs, Device(whole=lambda *each, one=one: each == one))]
        assert bool(hang) == bool(unsafe_transfers(schedule, programs)), (words(schedule), hang)
        assert by or not hang


def test_an_early_wait_hangs_gpipe_at_its_peak():
    """The first gradient was awaited before the last forward, which it depends on: an allocator's retry there never ended."""
    schedule = make_schedule("gpipe", 4, 8)
    programs = move_receives(lower(schedule), 1)
    assert stuck(programs, Device(whole=lambda rank, action: str(action) == "F0.7"))
    assert unsafe_transfers(schedule, programs)


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name != "gpipe"])
def test_early_receives_survive_neither_blocking_calls_nor_two_waits(name):
    """There are two ways to lower because of this. gpipe is only ever early where its sender is ahead."""
    programs = lower(make_schedule(name, 4, 8))
    assert stuck(programs, Device(blocking=True))
    if name != "zb-h2":  # which has so much in hand that each rank gets its input in time
        assert stuck(programs, Device(blocking=True, eager=True)) and stuck(programs, EVERY)


def test_receiving_only_when_needed_is_not_enough():
    """If each call blocks until the other end is there, neighbours that send to each other first wait for ever."""
    programs = lower(make_schedule("1f1b", 2, 4))
    late: Programs = []
    for items in programs:
        receives = {(i.stage, i.produced.micro_batch, i.produced.op.value == "F"): i for i in items if isinstance(i, Receive)}
        late.append([])
        for item in items:
            if isinstance(item, Action):
                late[-1] += filter(None, [receives.pop((item.stage, item.micro_batch, item.op.value == "F"), None)])
            if not isinstance(item, Receive):
                late[-1].append(item)
    assert not stuck(late, Device(blocking=True, eager=True))
    assert stuck(late, Device(blocking=True))
