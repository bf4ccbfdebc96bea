"""Transfers added to schedules: both sides agree on them, receives are early, and no kind of backend gets stuck on them."""

from __future__ import annotations

import itertools
import math
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
from gpu_waits import counts_before

from megatron.pipeline.schedules.lower import (
    Instruction,
    Receive,
    Send,
    SendsComplete,
    Transfer,
    channel_pairs,
    consumer,
    forward_only,
    lower,
)
from megatron.pipeline.schedules.schedule import SCHEDULES, Action, Op, Schedule, make_schedule
from megatron.pipeline.schedules.simulate import Costs, dependencies, simulate

SIZES = list(itertools.product(range(1, 7), range(1, 13)))


@cache
def grid(name: str) -> list[Schedule]:
    """Up to 6 ranks, 12 micro-batches and 3 chunks; training, and the forward passes alone."""
    chunks = [1, 2, 3] if SCHEDULES[name].chunks is None else [None]
    made = [make_schedule(name, p, m, v) for p, m in SIZES for v in chunks]
    return made + [forward_only(schedule) for schedule in made]


@cache
def lower_grid(name: str) -> list[tuple[Schedule, list[list[Instruction]]]]:
    return [(schedule, lower(schedule)) for schedule in grid(name)]


def needed_by(transfer: Transfer) -> tuple[int, int, bool]:
    """Stage, micro-batch and direction of the action that waits for it."""
    return transfer.stage, transfer.produced.micro_batch, transfer.produced.op is Op.F


def waits_for(action: Action) -> tuple[int, int, bool] | None:
    return None if action.op is Op.W else (action.stage, action.micro_batch, action.op is Op.F)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_result_for_another_rank_is_sent_once_and_received_once(name):
    for schedule, programs in lower_grid(name):
        sent = {i.number: (rank, i) for rank, items in enumerate(programs) for i in items if isinstance(i, Send)}
        received = {i.number: (rank, i) for rank, items in enumerate(programs) for i in items if isinstance(i, Receive)}
        counts = Counter(i.number for items in programs for i in items if isinstance(i, Transfer))
        assert set(counts.values()) <= {2} and sent.keys() == received.keys() == counts.keys()
        for number, (sender, send) in sent.items():
            receiver, receive = received[number]
            assert (send.produced, send.stage, send.peer) == (receive.produced, receive.stage, receiver)
            assert receive.peer == sender == schedule.placement[send.produced.stage] != receiver
            assert receiver == schedule.placement[send.stage]
        # What is sent is what `dependencies` says other ranks need; nothing else.
        needs = {
            (needed, action.stage)
            for action in schedule.actions
            for needed in dependencies(action, schedule)
            if schedule.placement[needed.stage] != schedule.placement[action.stage] and needed in schedule.actions
        }
        assert {(send.produced, send.stage) for _, send in sent.values()} == needs


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_actions_stay_in_order_and_sends_follow_what_they_send(name):
    for schedule, programs in lower_grid(name):
        for program, items in zip(schedule.programs, programs, strict=True):
            assert tuple(i for i in items if isinstance(i, Action)) == program
            for before, item in itertools.pairwise([None, *items]):
                assert not isinstance(item, Send) or before == item.produced


@pytest.mark.parametrize("name", SCHEDULES)
def test_receives_are_posted_in_the_senders_order(name):
    """All that a backend needs which matches by order alone; the channels are those that were opened."""
    for schedule, programs in lower_grid(name):
        orders: dict[tuple[int, int], list[list[int]]] = {}
        for rank, items in enumerate(programs):
            for item in items:
                if isinstance(item, Send):
                    orders.setdefault((rank, item.peer), [[], []])[0].append(item.number)
                elif isinstance(item, Receive):
                    orders.setdefault((item.peer, rank), [[], []])[1].append(item.number)
        assert all(sends == receives for sends, receives in orders.values())
        opened = list(channel_pairs(schedule.placement))
        assert orders.keys() <= set(opened) and len(opened) == len(set(opened))


def earliness(items: list[Instruction]) -> dict[int, int]:
    """Number of a receive -> actions between its post and the one that needs it."""
    at: dict[tuple[int, int, bool] | None, int] = {}
    actions = [item for item in items if isinstance(item, Action)]
    for index, action in enumerate(actions):
        at[waits_for(action)] = index
    done, found = 0, {}
    for item in items:
        if isinstance(item, Action):
            done += 1
        elif isinstance(item, Receive):
            found[item.number] = at[needed_by(item)] - done
    return found


@pytest.mark.parametrize("early", [1, 2])
@pytest.mark.parametrize("name", SCHEDULES)
def test_receives_are_early(name, early):
    """At least `early` actions ahead of the one that needs it, or as early as the sender's own needs and the start allow."""
    for schedule in grid(name)[::7]:
        programs = lower(schedule, early)
        ancestors = counts_before(schedule, programs)
        for rank, items in enumerate(programs):
            ahead = earliness(items)
            for number, count in ahead.items():
                send, receive = ancestors[number]
                assert send[rank] <= receive[rank], "before own work that the sender depends on"
                assert count >= early or send[rank] == receive[rank]


@pytest.mark.parametrize("name", SCHEDULES)
def test_in_one_order_nothing_is_early(name):
    """Both ends of a transfer at one place of an order that all ranks share, the receive with the action that needs it."""
    for schedule in grid(name)[::7]:
        programs = lower(schedule, early=0)
        assert [tuple(i for i in items if isinstance(i, Action)) for items in programs] == list(schedule.programs)
        for items in programs:
            assert not any(earliness(items).values())
            made: set[Action] = set()
            sent: set[int] = set()
            for item in items:
                if isinstance(item, Action):
                    made.add(item)
                elif isinstance(item, Send):
                    assert item.produced in made
                    sent.add(item.number)
                elif isinstance(item, SendsComplete):
                    assert sent.issuperset(item.numbers)
        for queue in (tagged, by_channel, by_direction):
            assert not stuck(schedule, programs, queue)


# Backends. A transfer takes place when both its ends are posted and nothing that was posted before blocks it.

Queue = Callable[[Transfer, int], object]  # a transfer, at the end on this rank -> the queue it must go through in order


def tagged(transfer: Transfer, rank: int) -> object:
    """Gloo: matched by number, nothing blocks anything."""
    return rank, transfer.number


def by_channel(transfer: Transfer, rank: int) -> object:
    """A communicator for each channel, which works off in order."""
    sends = isinstance(transfer, Send)
    return rank, transfer.peer, sends


def by_direction(transfer: Transfer, rank: int) -> object:
    """One communicator for everything that goes to higher ranks, and one for the rest; each works off in order."""
    sender, receiver = (rank, transfer.peer) if isinstance(transfer, Send) else (transfer.peer, rank)
    return rank, sender < receiver


def stuck(schedule: Schedule, programs: list[list[Instruction]], queue: Queue) -> list[str]:
    """Return the instruction of each rank when none can go on; nothing when all come to their end.

    As in the executor, an action waits for its input, a backward also for the send of the forward's output, the end for
    everything.
    """
    queues: dict[object, deque[int]] = {}
    ends: dict[int, list[deque[int]]] = {}
    transfers = [i for items in programs for i in items if isinstance(i, Transfer)]
    sent_by = {(t.produced.stage, t.produced.micro_batch): t.number for t in transfers if t.produced.op is Op.F}
    arriving = {needed_by(t): t.number for t in transfers}
    done: set[int] = set()
    position = [0] * len(programs)

    def may_run(action: Action) -> bool:
        needs = {arriving.get(waits_for(action))}  # type: ignore[arg-type]
        if action.op in (Op.B, Op.I):
            needs.add(sent_by.get((action.stage, action.micro_batch)))
        return needs - {None} <= done

    moved = True
    while moved:
        moved = False
        for rank, items in enumerate(programs):
            while position[rank] < len(items):
                item = items[position[rank]]
                if isinstance(item, Action) and not may_run(item):
                    break
                if isinstance(item, Transfer):
                    line = queues.setdefault(queue(item, rank), deque())
                    line.append(item.number)
                    ends.setdefault(item.number, []).append(line)
                position[rank] += 1
                moved = True
        for number, lines in ends.items():
            if number not in done and len(lines) == 2 and all(line[0] == number for line in lines):
                done.add(number)
                moved = True
                for line in lines:
                    line.popleft()
    waiting = [f"rank {r} at {items[position[r]]}" for r, items in enumerate(programs) if position[r] < len(items)]
    return waiting + [f"transfer {n} never done" for n in sorted(set(ends) - done)]


@pytest.mark.parametrize("queue", [tagged, by_channel])
@pytest.mark.parametrize("name", SCHEDULES)
def test_no_backend_gets_stuck(name, queue):
    for schedule, programs in lower_grid(name):
        assert not stuck(schedule, programs, queue), (name, schedule.ranks, schedule.micro_batches, schedule.stages)


@pytest.mark.parametrize(("name", "early"), [("interleaved", 1), ("zb-v", 2), ("1f1b", 2)])
def test_why_every_channel_needs_a_communicator_of_its_own(name, early):
    """On one that it shares with others, a send waits for a receive that was posted before it, whose sender waits for it."""
    assert any(stuck(schedule, lower(schedule, early), by_direction) for schedule in grid(name))
    assert not any(stuck(schedule, lower(schedule, early), by_channel) for schedule in grid(name))


def test_receives_in_another_order_get_stuck():
    """The check above sees it: two receives of a channel change places."""
    schedule = make_schedule("1f1b", 2, 4)
    programs = lower(schedule)
    places = [i for i, item in enumerate(programs[1]) if isinstance(item, Receive)]
    a, b = places[1], places[2]
    programs[1][a], programs[1][b] = programs[1][b], programs[1][a]
    assert not stuck(schedule, lower(schedule), by_channel)
    assert stuck(schedule, programs, by_channel)


def test_the_consumer_of_an_actions_result():
    assert consumer(Action(Op.F, 0, 3), 2) == 1 and consumer(Action(Op.F, 1, 3), 2) is None
    assert consumer(Action(Op.B, 1, 3), 2) == consumer(Action(Op.I, 1, 3), 2) == 0
    assert consumer(Action(Op.B, 0, 3), 2) is None and consumer(Action(Op.W, 1, 3), 2) is None


def test_channels_join_neighbouring_stages_both_ways():
    assert list(channel_pairs((0,))) == list(channel_pairs((0, 0))) == []
    assert list(channel_pairs((0, 1, 0, 1))) == [(0, 1), (1, 0)]
    assert list(channel_pairs((0, 1, 2, 2, 1, 0))) == [(0, 1), (1, 0), (1, 2), (2, 1)]
    assert list(channel_pairs((0, 1, 2, 0, 1, 2))) == [(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)]


def test_forward_only_keeps_the_order_of_the_forwards():
    for name in SCHEDULES:
        schedule = make_schedule(name, 3, 5)
        bare = forward_only(schedule)
        assert replace(bare, programs=schedule.programs) == schedule
        assert bare.programs == tuple(tuple(a for a in p if a.op is Op.F) for p in schedule.programs)


def most_unsettled(schedule: Schedule) -> int:
    """The most sends of a rank that nothing has proved received yet, the last ones of a step aside."""
    most = 0
    for program in lower(schedule):
        waiting: set[int] = set()
        peak = 0
        for item in program:
            if isinstance(item, Send):
                waiting.add(item.number)
            elif isinstance(item, SendsComplete):
                waiting -= set(item.numbers)
            elif isinstance(item, Action) and item.op is Op.F:
                peak = max(peak, len(waiting))
        most = max(most, peak)
    return most


@pytest.mark.parametrize("name", ["1f1b", "interleaved", "zb-h1", "zb-h2", "zb-v"])
def test_sent_tensors_are_let_go_while_the_step_runs(name):
    """The number of waiting tensors depends on the ranks, not on the number of micro-batches."""
    for ranks in (2, 4):
        few, many = (most_unsettled(make_schedule(name, ranks, m)) for m in (8 * ranks, 32 * ranks))
        assert few == many <= 8 * ranks, (ranks, few, many)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_finished_send_was_used_by_its_receiver(name):
    """The action that uses a tensor has ended when its sender is told that the send is done, whatever time anything takes."""
    schedule = make_schedule(name, 4, 7)
    told = 0
    for costs in (Costs(1, 1, 1, 0), Costs(1, 7, 0.1, 3), Costs(5, 0.2, 3, 0.5)):
        timeline = simulate(schedule, costs)
        programs = lower(schedule)
        sends = {item.number: item for program in programs for item in program if isinstance(item, Send)}
        assert {n for p in programs for i in p if isinstance(i, SendsComplete) for n in i.numbers} <= sends.keys()
        for program in programs:
            last = None
            for item in program:
                last = item if isinstance(item, Action) else last
                for number in item.numbers if isinstance(item, SendsComplete) else ():
                    made = sends[number].produced
                    kinds = (Op.F,) if made.op is Op.F else (Op.B, Op.I)
                    users = [Action(op, sends[number].stage, made.micro_batch) for op in kinds]
                    assert last is not None
                    assert any(timeline.end.get(user, math.inf) <= timeline.start[last] for user in users)
                    told += 1
    assert told
