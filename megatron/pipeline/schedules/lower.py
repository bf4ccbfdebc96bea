"""Add the transfers to a schedule. Only this module decides in which order ranks communicate. Pure.

The transfers from one rank to another form a channel. Both ranks post a channel's transfers in the same order, so that they
match even on a backend that matches only by order. Every direction has its own communicators (`transfer.py`), so an early
receive does not delay a send, and only the order within a channel matters.

A sent tensor must not be freed before the peer has received it. A later tensor from the peer proves that, if the peer computed
it after the action that used the sent one. So after the action that waits for the later tensor, a `SendsComplete` frees the
sends that are proven complete, without asking the backend.

On a GPU, a transfer is a kernel that spins until the other rank posts its end, and this process waits for all posted transfers
in two cases: if launches block (CUDA_LAUNCH_BLOCKING=1), and if an action synchronizes the device (the first use of a kernel or
communicator, an allocation that is retried). Whether such a wait ends depends on what has been posted:

    early >= 1   Receives are posted that many actions ahead, so that the transfer overlaps with computation, but never before
                 this rank's own actions on which the sender depends, directly or through other ranks. One action at a time may
                 then synchronize its device. If two ranks do so at the same time they may deadlock, since each can wait for
                 what the other computes next. Blocking launches always deadlock.
    early = 0    All ranks use the same global order of actions and transfers. Both ends of a transfer are posted just before
                 the action that needs it, so the sender may compute other actions in between. The rank at the first unfinished
                 position of the order can always proceed: every call may block, and every action may synchronize its device.
                 This is slower: a rank that is ahead waits for the receivers of its outputs.

A program therefore uses early = 0 when it runs for the first time, and always if launches block.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TypeAlias

from megatron.pipeline.schedules.schedule import Action, Op, Schedule
from megatron.pipeline.schedules.simulate import Costs, dependencies, simulate

EARLY = 1  # number of actions between posting a receive and the action that needs it


@dataclass(frozen=True, slots=True)
class Transfer:
    """Transfer of a tensor to or from the pipeline rank `peer`.

    produced: the action that computes the tensor. stage: the stage that needs it. number: identifies the transfer within the
    step, equal on both sides.
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
    """Instruction to free the sends with these numbers: the tensor that has just arrived proves that they were received."""

    numbers: tuple[int, ...]


Instruction: TypeAlias = Action | Send | Receive | SendsComplete


def consumer(action: Action, stages: int) -> int | None:
    """Return the stage that needs the output of `action`: the next one for F, the previous one for B and I; None if none."""
    if action.op is Op.W:
        return None
    stage = action.stage + 1 if action.op is Op.F else action.stage - 1
    return stage if 0 <= stage < stages else None


def lower(schedule: Schedule, early: int = EARLY) -> list[list[Instruction]]:
    """Return every rank's program with its sends, its receives and its `SendsComplete` instructions.

    early: number of actions by which receives are posted ahead where that is safe; 0 for an order in which every call may
    block. ValueError when the schedule deadlocks.
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
Channel: TypeAlias = dict[tuple[int, int], list[Transfer]]  # (sender, receiver) -> its transfers, in the order of the sender
Places: TypeAlias = list[dict[int, list[Instruction]]]  # for each rank: index of an action -> instructions to insert there


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
    """Return the index in `program` of the action that needs an input, by (stage, micro-batch, is forward)."""
    return {(a.stage, a.micro_batch, a.op is Op.F): i for i, a in enumerate(program) if a.op is not Op.W}


def _user_index(transfer: Transfer, needed: InputIndex) -> int:
    """Return the index, in the receiver's program, of the action that uses the transferred tensor."""
    produced = transfer.produced
    return needed[transfer.stage, produced.micro_batch, produced.op is Op.F]


def _completed_sends(
    rank: int,
    needed: list[InputIndex],
    incoming: dict[int, list[Transfer]],
    outgoing: dict[int, list[Transfer]],
    schedule: Schedule,
) -> dict[int, tuple[int, ...]]:
    """Return the numbers of the sends that are complete once an action's input has arrived, by index in the rank's program."""
    done: dict[int, list[int]] = {}
    for peer, channel in incoming.items():
        made_at = {action: i for i, action in enumerate(schedule.programs[peer])}
        waits = sorted((_user_index(t, needed[rank]), made_at[t.produced]) for t in channel)
        open_sends = sorted((_user_index(t, needed[peer]), t.number) for t in outgoing[peer])
        for index, made in waits:
            # The peer's action at index `made` ran after its earlier actions, which had then used the tensors sent to them.
            while open_sends and open_sends[0][0] <= made:
                done.setdefault(index, []).append(open_sends.pop(0)[1])
    return {index: tuple(numbers) for index, numbers in done.items()}


def _place_sends(schedule: Schedule, channels: Channel) -> Places:
    """Place each send directly after the action that computes its tensor."""
    places: Places = [{} for _ in schedule.programs]
    made_at = [{action: index for index, action in enumerate(program)} for program in schedule.programs]
    for (sender, _), channel in channels.items():
        for transfer in channel:
            places[sender][made_at[sender][transfer.produced]] = [_send(transfer)]
    return places


def _place_receives(channels: Channel, needed: list[InputIndex], before: Mapping[Action, list[int]], early: int) -> Places:
    """Place each receive `early` actions ahead of the action that needs it, or later if that is not safe.

    before: the result of `_ancestors`.
    """
    places: Places = [{} for _ in needed]
    for (sender, receiver), channel in channels.items():
        latest, posts = _user_index(channel[-1], needed[receiver]), []
        for transfer in reversed(channel):  # a receive must not be posted after one that the sender sends later
            latest = min(latest, _user_index(transfer, needed[receiver]) - early)
            latest = max(latest, before[transfer.produced][receiver])
            posts.append((latest, _receive(transfer, sender)))
        for place, receive in reversed(posts):
            places[receiver].setdefault(place, []).append(receive)
    return places


def _ancestors(schedule: Schedule, start: Mapping[Action, float]) -> dict[Action, list[int]]:
    """Return, for each action, how many actions of each rank's program must have run by its end, including itself."""
    counts: dict[Action, list[int]] = {}
    ran: list[list[int]] = [[0] * schedule.ranks for _ in schedule.programs]
    for action in sorted(start, key=start.__getitem__):  # durations are positive, so dependencies come first
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
    """Place both ends of each transfer just before the simulated start of the action that needs it.

    Every rank's program is then sorted by the same global order: by time, with transfers before actions, then by number.
    """
    starts = [[start[action] for action in program] for program in schedule.programs]
    due: list[list[tuple[float, int, Instruction]]] = [[] for _ in schedule.programs]
    for (sender, receiver), channel in channels.items():
        for transfer in channel:
            time = starts[receiver][_user_index(transfer, needed[receiver])]
            due[sender].append((time, transfer.number, _send(transfer)))
            due[receiver].append((time, transfer.number, _receive(transfer, sender)))
    places: Places = [{} for _ in schedule.programs]
    for rank, due_on_rank in enumerate(due):
        for time, _, item in sorted(due_on_rank, key=lambda entry: entry[:2]):
            places[rank].setdefault(bisect_left(starts[rank], time), []).append(item)
    return places


def _send(transfer: Transfer) -> Send:
    return Send(transfer.produced, transfer.stage, transfer.peer, transfer.number)


def _receive(transfer: Transfer, sender: int) -> Receive:
    return Receive(transfer.produced, transfer.stage, sender, transfer.number)


def forward_only(schedule: Schedule) -> Schedule:
    """Return the schedule without its backward passes, for an evaluation."""
    programs = tuple(tuple(a for a in program if a.op is Op.F) for program in schedule.programs)
    return replace(schedule, programs=programs)


def channel_pairs(placement: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Yield every (sender, receiver) pair of ranks with neighbouring stages, in an order that is the same on all ranks."""
    pairs = set(pairwise(placement))
    yield from sorted({(a, b) for pair in pairs for a, b in (pair, pair[::-1]) if a != b})
