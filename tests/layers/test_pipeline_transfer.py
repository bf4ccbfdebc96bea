"""Channels: what is sent arrives, in whatever order it is waited for; nothing blocks until it must."""

from __future__ import annotations

import gc
import time
import weakref
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks

from megatron.mesh.grid import Grid
from megatron.mesh.mesh import Axis, Mesh
from megatron.pipeline.schedules.lower import channel_pairs
from megatron.pipeline.schedules.schedule import looped, v_shaped
from megatron.pipeline.transfer import Channels

CPU = torch.device("cpu")
MANY = 40


def channels(placement: tuple[int, ...] = ()) -> Channels:
    """The ends of this rank, all ranks being one pipeline."""
    size = dist.get_world_size()
    mesh = Mesh.build(Grid(pp=size), dist.get_rank())
    made = Channels(mesh.pp, mesh.pp_back, CPU)
    made.connect(list(channel_pairs(placement or looped(size, 1))))
    return made


def value(sender: int, number: int) -> torch.Tensor:
    """Recognisable, and of another shape for each number."""
    return torch.full((2 + number % 3, 5), 1000.0 * sender + number)


def ring(backwards: bool):
    """Everybody sends many to the next rank, with none received yet, and receives as many; waits for them in either order."""
    ends, size, me = channels(looped(dist.get_world_size(), 2)), dist.get_world_size(), dist.get_rank()
    to, source = (me + 1) % size, (me - 1) % size
    for n in range(MANY):
        ends.send(value(me, n), to, n)
    room = [ends.receive(tuple(value(source, n).shape), torch.float32, source, n) for n in range(MANY)]
    for n, receiving in reversed(list(enumerate(room))) if backwards else enumerate(room):
        assert torch.equal(receiving.wait(), value(source, n)), f"number {n} is not what was sent"
    ends.wait_all_sends()
    assert not ends._sending


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("world", [2, 3])
def test_many_outstanding_in_any_order(world, backwards):
    on_ranks(world, ring, backwards)


def both_ways():
    """Each of two ranks posts its receives first, then sends: neither direction waits for the other."""
    ends, me = channels(), dist.get_rank()
    peer = 1 - me
    room = [ends.receive(tuple(value(peer, n).shape), torch.float32, peer, n) for n in range(MANY)]
    for n in range(MANY):
        ends.send(value(me, n), peer, n)
    for n, receiving in enumerate(room):
        assert torch.equal(receiving.wait(), value(peer, n))
    ends.wait_all_sends()


def test_two_ranks_send_to_each_other_at_once():
    on_ranks(2, both_ways)


def other_types():
    """bfloat16 and tensors with gaps arrive as they are; what is sent does not change afterwards."""
    ends, me = channels(), dist.get_rank()
    whole = torch.arange(24.0).view(4, 6).to(torch.bfloat16)
    if me == 0:
        ends.send(whole[:, ::2], 1, 0)
        ends.wait_all_sends()
        return
    got = ends.receive((4, 3), torch.bfloat16, 0, 0).wait()
    assert got.dtype is torch.bfloat16 and torch.equal(got, whole[:, ::2])


def test_tensors_of_any_type_and_stride_arrive():
    on_ranks(2, other_types)


def slow_peer():
    """Seconds that posting takes on rank 0 while rank 1 sleeps; and whether a settled tensor is let go."""
    ends, me = channels(), dist.get_rank()
    dist.barrier()
    if me == 1:
        time.sleep(0.5)
        ends.receive((3,), torch.float32, 0, 7).wait()
        ends.send(torch.ones(3), 0, 8)
        ends.wait_all_sends()
        return 0.0
    began = time.perf_counter()
    x = torch.ones(3)
    gone = weakref.ref(x)
    ends.send(x, 1, 7)
    receiving = ends.receive((3,), torch.float32, 1, 8)
    took = time.perf_counter() - began
    del x
    gc.collect()
    assert gone() is not None, "a tensor must live until it has left"
    ends.wait_send(99)  # that was not sent
    ends.wait_send(7)
    assert gone() is None and not ends._sending, "a settled send keeps its tensor"
    ends.wait_send(7)
    assert receiving.wait().sum() == 3
    ends.wait_all_sends()
    return took


def test_posting_does_not_wait_and_settling_lets_go():
    assert on_ranks(2, slow_peer)[0] < 0.25


def pass_around(placement: tuple[int, ...]):
    """One token around the stages and back, on the channels of a placement, right after they were opened."""
    ends, me, seen = channels(placement), dist.get_rank(), []
    there = list(enumerate(pairwise(placement)))
    for number, (a, b) in [*there, *((100 + n, (b, a)) for n, (a, b) in reversed(there))]:
        sent = value(a, number)
        if a != b and me == a:
            ends.send(sent, b, number)
        elif a != b and me == b:
            seen.append(torch.equal(ends.receive(tuple(sent.shape), torch.float32, a, number).wait(), sent))
    ends.wait_all_sends()
    return seen


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("place", [looped, v_shaped])
def test_looped_and_v_placements(world, place):
    placement = place(world, 2)
    hops = sum(a != b for a, b in pairwise(placement))
    results = on_ranks(world, pass_around, placement)
    assert all(all(seen) for seen in results) and sum(map(len, results)) == 2 * hops


def answer(source: int):
    ends, me = channels(), dist.get_rank()
    x = torch.full((2, 3), float(me))
    assert ends.broadcast(x, source) is x
    return x


@pytest.mark.parametrize("source", [0, 2])
def test_broadcast_gives_all_ranks_the_sources_tensor(source):
    assert all(torch.equal(x, torch.full((2, 3), float(source))) for x in on_ranks(3, answer, source))


def test_one_process_has_no_channels():
    ends = Channels(Axis.alone("pp"), Axis.alone("pp_back"), CPU)
    ends.connect([])
    ends.wait_all_sends()
    x = torch.ones(2)
    assert ends.broadcast(x, 0) is x
