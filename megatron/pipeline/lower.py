"""Adds the transfers to a schedule: the one place that decides in which order ranks communicate. Pure.

Between two ranks, transfers in one direction form a channel. On it the sender sends in the order in which its program makes
the tensors, and the receiver posts its receives in that same order, so the two sides always agree, also on a backend that
matches by order alone. A receive is posted some actions before the one that waits for it, so that the transfer runs beside
the computation; that changes when a receive is posted, never in which order. Every direction has communicators of its own
(`transfer.py`), so an early receive holds up no send, and only the order within a channel matters.

A sent tensor must live until the peer has it. What comes from the peer later proves that: it was made after the action that
used the tensor. So behind the action that waits for it stand the sends that are done, whatever the backend can tell of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TypeAlias

from megatron.pipeline.schedule import Action, Op, Schedule

EARLY = 1  # actions between posting a receive and needing it: the one that runs meanwhile


@dataclass(frozen=True, slots=True)
class Transfer:
    """What `produced` made goes to the pipeline rank `peer`, or comes from it, for stage `stage`.

    number: the same on both sides, and no other transfer's of the step.
    """

    produced: Action
    stage: int
    peer: int
    number: int


@dataclass(frozen=True, slots=True)
class Send(Transfer):
    pass


@dataclass(frozen=True, slots=True)
class Receive(Transfer):
    pass


@dataclass(frozen=True, slots=True)
class Done:
    """The sends with these numbers have been received, as what has just arrived proves."""

    numbers: tuple[int, ...]


Item: TypeAlias = Action | Send | Receive | Done


def consumer(action: Action, stages: int) -> int | None:
    """The stage that needs what `action` makes: hidden states go up, their gradients down. None where there is none."""
    if action.op is Op.W:
        return None
    stage = action.stage + 1 if action.op is Op.F else action.stage - 1
    return stage if 0 <= stage < stages else None


def lower(schedule: Schedule, early: int = EARLY) -> list[list[Item]]:
    """Every rank's program with its sends, each behind the action that makes what is sent, its receives, and what is done."""
    needed = [_needed(program) for program in schedule.programs]
    sends: list[dict[Action, Send]] = [{} for _ in schedule.programs]
    channels: dict[tuple[int, int], list[Transfer]] = {}
    number = 0
    for rank, program in enumerate(schedule.programs):
        for action in program:
            stage = consumer(action, schedule.stages)
            if stage is not None and (peer := schedule.placement[stage]) != rank:
                sends[rank][action] = Send(action, stage, peer, number)
                channels.setdefault((rank, peer), []).append(sends[rank][action])
                number += 1
    lowered = []
    for rank, program in enumerate(schedule.programs):
        incoming = {sender: channel for (sender, receiver), channel in channels.items() if receiver == rank}
        posted = _posted(needed[rank], len(program), incoming, early)
        done = _done(rank, needed, incoming, {peer: channels.get((rank, peer), []) for peer in incoming}, schedule)
        items: list[Item] = []
        for index, action in enumerate(program):
            items += posted.get(index, ())
            items.append(action)
            if action in sends[rank]:
                items.append(sends[rank][action])
            if index in done:
                items.append(Done(done[index]))
        lowered.append(items)
    return lowered


Need: TypeAlias = dict[tuple[int, int, bool], int]


def _needed(program: tuple[Action, ...]) -> Need:
    """(stage, micro-batch, forward or not) -> the index of the action that takes this input."""
    return {(a.stage, a.micro_batch, a.op is Op.F): i for i, a in enumerate(program) if a.op is not Op.W}


def _user(transfer: Transfer, needed: Need) -> int:
    """The index, in the receiver's program, of the action that uses what is transferred."""
    made = transfer.produced
    return needed[transfer.stage, made.micro_batch, made.op is Op.F]


def _done(
    rank: int,
    needed: list[Need],
    incoming: dict[int, list[Transfer]],
    outgoing: dict[int, list[Transfer]],
    schedule: Schedule,
) -> dict[int, tuple[int, ...]]:
    """Index in the rank's program -> the sends that are done once that action's input is there."""
    done: dict[int, list[int]] = {}
    for peer, channel in incoming.items():
        made_at = {action: i for i, action in enumerate(schedule.programs[peer])}
        waits = sorted((_user(t, needed[rank]), made_at[t.produced]) for t in channel)
        open_sends = sorted((_user(t, needed[peer]), t.number) for t in outgoing[peer])
        for index, made in waits:
            while open_sends and open_sends[0][0] <= made:
                done.setdefault(index, []).append(open_sends.pop(0)[1])
    return {index: tuple(numbers) for index, numbers in done.items()}


def _posted(needed: Need, length: int, incoming: dict[int, list[Transfer]], early: int) -> dict[int, list[Receive]]:
    """Index in the program -> the receives posted before that action."""
    posted: dict[int, list[Receive]] = {}
    for sender, channel in incoming.items():
        latest = length
        moments = []
        for transfer in reversed(channel):  # none later than one that the sender sends after it
            latest = min(latest, _user(transfer, needed) - early)
            moments.append(max(0, latest))
        for moment, transfer in zip(reversed(moments), channel, strict=True):
            receive = Receive(transfer.produced, transfer.stage, sender, transfer.number)
            posted.setdefault(moment, []).append(receive)
    return posted


def forward_only(schedule: Schedule) -> Schedule:
    """The same order without the backward passes: what an evaluation runs."""
    programs = tuple(tuple(a for a in program if a.op is Op.F) for program in schedule.programs)
    return replace(schedule, programs=programs)


def channels_of(placement: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Every (sender, receiver) between neighbouring stages, in one order."""
    pairs = set(pairwise(placement))
    yield from sorted({(a, b) for pair in pairs for a, b in (pair, pair[::-1]) if a != b})
