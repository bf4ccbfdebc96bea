"""Adds the transfers to a schedule: the one place that decides in which order ranks communicate. Pure.

Between two ranks, transfers in one direction form a channel. Both ends post a channel's transfers in one order, so the two
sides always agree, also on a backend that matches by order alone. Every direction has communicators of its own
(`transfer.py`), so an early receive holds up no send, and only the order within a channel matters.

A sent tensor must live until the peer has it. What comes from the peer later proves that: it was made after the action that
used the tensor. So behind the action that waits for it stand the sends that are done, whatever the backend can tell of them.

On a GPU, a transfer is a kernel that spins until the other end is there, and two things let this process wait for all that it
has posted: a launch that blocks (CUDA_LAUNCH_BLOCKING=1), and a wait for the whole device (a kernel or a communicator used for
the first time, an allocator that retries). What is posted decides whether such a wait ends:

    early >= 1   Receives are posted that many actions ahead, so that the transfer runs beside the computation; but never before
                 own work that their sender depends on, through however many ranks. Then one action at a time may wait for its
                 whole device. Two on different ranks at the same moment may not: each can wait for what the other makes next,
                 and early receives cannot rule that out. Blocking launches get stuck at once.
    early = 0    All ranks share one order of actions and transfers. A receive stands right before the action that needs it, and
                 its send at that place of the order, so an output may wait while its rank goes on computing. Whoever stands at
                 the first unfinished place of the order can always go on: every call may block, and every action may wait for
                 its whole device. It costs time: a rank that is ahead waits for the one that takes what it sends.

So a program runs with early = 0 the first time, when all that is new waits for the device, and always under blocking launches.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TypeAlias

from megatron.pipeline.schedules.schedule import Action, Op, Schedule
from megatron.pipeline.schedules.simulate import Costs, dependencies, simulate

EARLY = 1  # actions between posting a receive and needing it: the one that runs meanwhile


@dataclass(frozen=True, slots=True)
class Transfer:
    """A tensor that goes to the pipeline rank `peer`, or comes from it: `produced` made it, for stage `stage`.

    number: the same on both sides, and no other transfer's of the step.
    """

    produced: Action
    stage: int
    peer: int
    number: int


@dataclass(frozen=True, slots=True)
class Send(Transfer):
    """Instruction to start sending the output of an action of this rank."""


@dataclass(frozen=True, slots=True)
class Receive(Transfer):
    """Instruction to start receiving the input of an action of this rank."""


@dataclass(frozen=True, slots=True)
class SendsComplete:
    """Instruction to free the sends with these numbers: they were received, as what has just arrived proves."""

    numbers: tuple[int, ...]


Instruction: TypeAlias = Action | Send | Receive | SendsComplete


def consumer(action: Action, stages: int) -> int | None:
    """Return the stage that needs the output of `action`, or None: hidden states go up, their gradients down."""
    if action.op is Op.W:
        return None
    stage = action.stage + 1 if action.op is Op.F else action.stage - 1
    return stage if 0 <= stage < stages else None


def lower(schedule: Schedule, early: int = EARLY) -> list[list[Instruction]]:
    """Return every rank's program with its sends, its receives, and the sends that are complete.

    early: actions between posting a receive and needing it, where nothing speaks against it; 0 for an order in which every
    call may block. ValueError when the programs wait for one another for ever.
    """
    needed = [_index_by_input(program) for program in schedule.programs]
    channels = _channels(schedule)
    start = simulate(schedule, Costs()).start
    behind: Places = [{} for _ in schedule.programs]
    if early:
        behind = _place_sends(schedule, channels)
        ahead = _place_receives(channels, needed, _ancestors(schedule, start), early)
    else:
        ahead = _place_in_one_order(schedule, channels, needed, start)
    lowered = []
    for rank, program in enumerate(schedule.programs):
        incoming = {sender: channel for (sender, receiver), channel in channels.items() if receiver == rank}
        done = _completed_sends(rank, needed, incoming, {peer: channels.get((rank, peer), []) for peer in incoming}, schedule)
        items: list[Instruction] = []
        for index, action in enumerate(program):
            items += [*ahead[rank].get(index, ()), action, *behind[rank].get(index, ())]
            if index in done:
                items.append(SendsComplete(done[index]))
        lowered.append(items + ahead[rank].get(len(program), []))
    return lowered


InputIndex: TypeAlias = dict[tuple[int, int, bool], int]
Channel: TypeAlias = dict[tuple[int, int], list[Transfer]]  # (sender, receiver) -> its transfers, in the order they are made
Places: TypeAlias = list[dict[int, list[Instruction]]]  # of each rank: index of an action -> what stands next to it


def _channels(schedule: Schedule) -> Channel:
    channels: Channel = {}
    number = 0
    for rank, program in enumerate(schedule.programs):
        for action in program:
            stage = consumer(action, schedule.stages)
            if stage is not None and (peer := schedule.placement[stage]) != rank:
                channels.setdefault((rank, peer), []).append(Transfer(action, stage, peer, number))
                number += 1
    return channels


def _index_by_input(program: tuple[Action, ...]) -> InputIndex:
    """(stage, micro-batch, forward or not) -> the index of the action that takes this input."""
    return {(a.stage, a.micro_batch, a.op is Op.F): i for i, a in enumerate(program) if a.op is not Op.W}


def _user_index(transfer: Transfer, needed: InputIndex) -> int:
    """The index, in the receiver's program, of the action that uses what is transferred."""
    made = transfer.produced
    return needed[transfer.stage, made.micro_batch, made.op is Op.F]


def _completed_sends(
    rank: int,
    needed: list[InputIndex],
    incoming: dict[int, list[Transfer]],
    outgoing: dict[int, list[Transfer]],
    schedule: Schedule,
) -> dict[int, tuple[int, ...]]:
    """Index in the rank's program -> the sends that are done once that action's input is there."""
    done: dict[int, list[int]] = {}
    for peer, channel in incoming.items():
        made_at = {action: i for i, action in enumerate(schedule.programs[peer])}
        waits = sorted((_user_index(t, needed[rank]), made_at[t.produced]) for t in channel)
        open_sends = sorted((_user_index(t, needed[peer]), t.number) for t in outgoing[peer])
        for index, made in waits:
            # What the peer made at `made` came after its actions before that, and so after they had used what was sent to them.
            while open_sends and open_sends[0][0] <= made:
                done.setdefault(index, []).append(open_sends.pop(0)[1])
    return {index: tuple(numbers) for index, numbers in done.items()}


def _place_sends(schedule: Schedule, channels: Channel) -> Places:
    """Each send, to stand right behind the action that makes what is sent."""
    places: Places = [{} for _ in schedule.programs]
    made_at = [{action: index for index, action in enumerate(program)} for program in schedule.programs]
    for (sender, _), channel in channels.items():
        for transfer in channel:
            places[sender][made_at[sender][transfer.produced]] = [_send(transfer)]
    return places


def _place_receives(channels: Channel, needed: list[InputIndex], before: Mapping[Action, list[int]], early: int) -> Places:
    """Each receive, to stand `early` actions ahead of the one that needs it, or later; before: see `_ancestors`."""
    places: Places = [{} for _ in needed]
    for (sender, receiver), channel in channels.items():
        latest, posts = _user_index(channel[-1], needed[receiver]), []
        for transfer in reversed(channel):  # none later than one that the sender sends after it
            latest = min(latest, _user_index(transfer, needed[receiver]) - early)
            latest = max(latest, before[transfer.produced][receiver])
            posts.append((latest, _receive(transfer, sender)))
        for place, receive in reversed(posts):
            places[receiver].setdefault(place, []).append(receive)
    return places


def _ancestors(schedule: Schedule, start: Mapping[Action, float]) -> dict[Action, list[int]]:
    """Action -> how many actions of each rank's program must have run before it, itself included."""
    counts: dict[Action, list[int]] = {}
    ran: list[list[int]] = [[0] * schedule.ranks for _ in schedule.programs]
    for action in sorted(start, key=start.__getitem__):  # every action takes time, so what it needs comes before it
        rank = schedule.placement[action.stage]
        own = ran[rank].copy()
        for needed in dependencies(action, schedule):
            if schedule.placement[needed.stage] != rank:
                own = list(map(max, own, counts[needed]))
        own[rank] += 1
        counts[action] = ran[rank] = own
    return counts


def _place_in_one_order(
    schedule: Schedule, channels: Channel, needed: list[InputIndex], start: Mapping[Action, float]
) -> Places:
    """Both ends of a transfer right before the start of the action that needs it, on a clock that all ranks share.

    The order is (time, transfers before actions, number): every rank's program is sorted by it, and no two are alike in it.
    """
    starts = [[start[action] for action in program] for program in schedule.programs]
    due: list[list[tuple[float, int, Instruction]]] = [[] for _ in schedule.programs]
    for (sender, receiver), channel in channels.items():
        for transfer in channel:
            time = starts[receiver][_user_index(transfer, needed[receiver])]
            due[sender].append((time, transfer.number, _send(transfer)))
            due[receiver].append((time, transfer.number, _receive(transfer, sender)))
    places: Places = [{} for _ in schedule.programs]
    for rank, of_rank in enumerate(due):
        for time, _, item in sorted(of_rank, key=lambda entry: entry[:2]):
            places[rank].setdefault(bisect_left(starts[rank], time), []).append(item)
    return places


def _send(transfer: Transfer) -> Send:
    return Send(transfer.produced, transfer.stage, transfer.peer, transfer.number)


def _receive(transfer: Transfer, sender: int) -> Receive:
    return Receive(transfer.produced, transfer.stage, sender, transfer.number)


def forward_only(schedule: Schedule) -> Schedule:
    """Return the same order without the backward passes: an evaluation runs it."""
    programs = tuple(tuple(a for a in program if a.op is Op.F) for program in schedule.programs)
    return replace(schedule, programs=programs)


def channel_pairs(placement: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Yield every (sender, receiver) between neighbouring stages, in one order."""
    pairs = set(pairwise(placement))
    yield from sorted({(a, b) for pair in pairs for a, b in (pair, pair[::-1]) if a != b})
