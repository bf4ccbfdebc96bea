"""A model of pipelines on GPUs: a transfer is a kernel that spins until its other end is there.

A rank that has posted one goes on, unless its call blocks (CUDA_LAUNCH_BLOCKING=1) or its next action waits for the whole
device, as a new kernel or an allocator's retry does. Then it stands there until all that it has posted is done.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from megatron.pipeline.schedules.lower import Instruction, Receive, Send, Transfer
from megatron.pipeline.schedules.schedule import Action, Op, Schedule
from megatron.pipeline.schedules.simulate import dependencies

Programs = list[list[Instruction]]


@dataclass(frozen=True)
class Device:
    """The waits of a rank.

    Attributes:
        blocking: every transfer's call waits for its other end.
        whole: for a rank and an action, whether the action waits for the whole device.
        eager: a send ends when it has begun, as a small one does; else when it is received.
    """

    blocking: bool = False
    whole: Callable[[int, Action], bool] = lambda rank, action: False
    eager: bool = False


def needed_input(action: Action) -> tuple[int, int, bool] | None:
    return None if action.op is Op.W else (action.stage, action.micro_batch, action.op is Op.F)


def stuck(programs: Programs, device: Device) -> list[str]:
    """Return the instruction of each rank when none can go on; nothing when all come to their end."""
    sent: set[int] = set()
    received: set[int] = set()
    posted: list[list[Instruction]] = [[] for _ in programs]
    position = [0] * len(programs)
    arriving = {
        (item.stage, item.produced.micro_batch, item.produced.op is Op.F): item.number
        for items in programs
        for item in items
        if isinstance(item, Receive)
    }

    def over(transfer: Instruction) -> bool:
        if isinstance(transfer, Receive):
            return transfer.number in sent
        return not isinstance(transfer, Send) or device.eager or transfer.number in received

    def may_pass(rank: int, item: Instruction) -> bool:
        if isinstance(item, Transfer):
            return not device.blocking or over(item)
        if not isinstance(item, Action):
            return True
        needed = arriving.get(needed_input(item))  # type: ignore[arg-type]
        if needed is not None and needed not in sent:
            return False
        return not device.whole(rank, item) or all(map(over, posted[rank]))

    ready = deque(range(len(programs)))
    while ready:
        rank = ready.popleft()
        items = programs[rank]
        while position[rank] < len(items):
            item = items[position[rank]]
            if isinstance(item, Transfer) and item.number not in (sent if isinstance(item, Send) else received):
                (sent if isinstance(item, Send) else received).add(item.number)
                posted[rank] = [*(t for t in posted[rank] if not over(t)), item]
                ready.append(item.peer)
            if not may_pass(rank, item):
                break
            position[rank] += 1
    return [f"rank {r} at {items[position[r]]}" for r, items in enumerate(programs) if position[r] < len(items)]


def counts_before(schedule: Schedule, programs: Programs) -> dict[int, tuple[list[int], list[int]]]:
    """Count the actions that must have run until each transfer is posted.

    Args:
        schedule: of the pipeline.
        programs: the schedule with its transfers.

    Returns:
        Number of a transfer -> for its send and its receive, the number of each rank's actions, through whatever ranks in
        between. The rank's own count is that of all its actions before.
    """
    ran = [[0] * len(programs) for _ in programs]
    after: dict[Action, list[int]] = {}
    found: dict[int, list[list[int]]] = {}
    position = [0] * len(programs)
    moved = True
    while moved:
        moved = False
        for rank, items in enumerate(programs):
            while position[rank] < len(items):
                item = items[position[rank]]
                if isinstance(item, Action):
                    needs = [a for a in dependencies(item, schedule) if schedule.placement[a.stage] != rank]
                    if any(a not in after for a in needs):
                        break
                    now = ran[rank].copy()
                    for a in needs:
                        now = list(map(max, now, after[a]))
                    now[rank] += 1
                    after[item] = ran[rank] = now
                elif isinstance(item, Transfer):
                    found.setdefault(item.number, [[], []])[isinstance(item, Receive)] = ran[rank]
                position[rank] += 1
                moved = True
    return {number: (send, receive) for number, (send, receive) in found.items()}


def unsafe_transfers(schedule: Schedule, programs: Programs) -> list[int]:
    """List the transfers that hang when one action, of those that its rank runs meanwhile, waits for the whole device.

    One end is posted, and the rank's later action must run before the other end is.
    """
    ends = {item.number: (rank, item.peer) for rank, items in enumerate(programs) for item in items if isinstance(item, Send)}
    bad = []
    for number, (send, receive) in counts_before(schedule, programs).items():
        sender, receiver = ends[number]
        if send[receiver] > receive[receiver] or receive[sender] > send[sender]:
            bad.append(number)
    return bad
