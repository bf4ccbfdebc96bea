"""Ranks of one host talk through memory that they share: gloo's values, sums in a fixed order, bounded, and without traces."""

from __future__ import annotations

import gc
import os
import subprocess
import time
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from torch import Tensor

from megatron.mesh import shared_memory, shared_opening
from megatron.mesh.grid import Grid
from megatron.mesh.mesh import Axis, Mesh
from megatron.mesh.shared_collectives import DIRECT_BYTES
from megatron.mesh.shared_memory import MAX_SLOTS, SLOT
from megatron.parallel import collectives
from megatron.pipeline.transfer import Channels

RING = MAX_SLOTS * SLOT  # bytes that a channel holds
# Nothing, one number, less than a slot, a slot and a bit, more than what is summed directly, more than a channel holds.
SIZES = (0, 4, 1000, SLOT // 4 + 4, 3 * DIRECT_BYTES // 4, RING // 4 + 1204)


def shared_axis(**layout: int) -> Axis:
    """Return an axis over all ranks, in shared memory."""
    (name,) = layout
    axis = Mesh.build(Grid(**layout), dist.get_rank()).axis(name)
    assert axis.shared is not None
    return axis


def numbers(size: int, rank: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return numbers `[size]` whose sum depends on the order in which they are added."""
    generator = torch.Generator().manual_seed(rank)
    return (torch.randn(size, generator=generator) * 10.0 ** (rank % 3)).to(dtype)


def each_collective(axis: Axis, x: Tensor) -> list[Tensor]:
    """Return what each collective makes of `x`, whose size the ranks divide; `x` stays as it is."""
    slices, joined = x.clone(), x.clone()
    collectives.reduce_slices_async(slices, axis).wait()
    collectives.gather_slices_async(joined, axis).wait()
    return [
        collectives.all_reduce(x.clone(), axis),
        collectives.all_reduce(x.clone(), axis, "max"),
        collectives.all_gather(x, axis),
        collectives.reduce_scatter(x, axis),
        collectives.own_slice(slices, axis).clone(),
        joined,
        collectives.ring_shift_async(x, axis).wait(),
    ]


def compare_with_gloo(dtype: torch.dtype) -> None:
    axis = shared_axis(tp=dist.get_world_size())
    for size in SIZES:
        x = numbers(size, axis.rank, dtype)
        for ours, gloo in zip(each_collective(axis, x), each_collective(replace(axis, shared=None), x), strict=True):
            torch.testing.assert_close(ours, gloo)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_every_collective_gives_what_gloo_gives(world: int) -> None:
    sizes = [size for size in SIZES if size % world]
    if world == 3:
        on_ranks(3, compare_sums, sizes)  # of sizes that do not divide
    else:
        on_ranks(world, compare_with_gloo, torch.float32)


def compare_sums(sizes: list[int]) -> None:
    axis = shared_axis(tp=dist.get_world_size())
    for size in sizes:
        x = numbers(size, axis.rank)
        torch.testing.assert_close(
            collectives.all_reduce(x.clone(), axis), collectives.all_reduce(x.clone(), replace(axis, shared=None))
        )


def test_sixteen_bits_and_integers_go_through_too() -> None:
    on_ranks(2, compare_with_gloo, torch.bfloat16)
    on_ranks(2, compare_with_gloo, torch.int64)


def sums_in_order() -> list[list[float]]:
    axis = shared_axis(tp=dist.get_world_size())
    sums = []
    for size in SIZES[2:]:
        parts = [numbers(size, rank) for rank in range(axis.size)]
        in_order = ((parts[0] + parts[1]) + parts[2]) + parts[3]
        other = parts[0] + (parts[1] + (parts[2] + parts[3]))
        assert not torch.equal(in_order, other), "the order would not show"
        time.sleep(0.05 * (axis.rank % 2))  # whoever comes first
        got = collectives.all_reduce(parts[axis.rank].clone(), axis)
        assert torch.equal(got, in_order)
        share = collectives.reduce_scatter(parts[axis.rank][: size // 4 * 4], axis)
        assert torch.equal(share, collectives.own_slice(in_order[: size // 4 * 4], axis))
        sums.append(got[:8].tolist())
    return sums


def test_sums_are_formed_in_the_order_of_the_ranks() -> None:
    results = on_ranks(4, sums_in_order)
    assert all(result == results[0] for result in results)


def wait_in_another_order() -> None:
    """Two groups, operations of each larger than a channel, and ranks that wait for them in different orders."""
    mesh = Mesh.build(Grid(tp=2, dp=2), dist.get_rank())
    size = 2 * RING // 4
    x, y = torch.ones(size), torch.ones(size)
    works = [collectives.all_reduce_async(x, mesh.tp), collectives.all_reduce_async(y, mesh.dp)]
    for work in works if mesh.rank in (0, 3) else reversed(works):
        work.wait()
    assert x.eq(2).all()
    assert y.eq(2).all()


def test_ranks_may_wait_in_any_order() -> None:
    on_ranks(4, wait_in_another_order)


def send_both_ways() -> None:
    """Each rank sends more than a channel holds before it receives."""
    mesh = Mesh.build(Grid(pp=2), dist.get_rank())
    channels = Channels(mesh.pp, mesh.pp_back, torch.device("cpu"))
    peer, shape = 1 - mesh.rank, (3, RING // 8)
    channels.send(torch.full(shape, float(mesh.rank)), peer, 2 + mesh.rank)
    channels.send(torch.full((5,), 7.0 + mesh.rank), peer, 4 + mesh.rank)
    first = channels.receive(shape, torch.float32, peer, 2 + peer)
    second = channels.receive((5,), torch.float32, peer, 4 + peer)
    assert second.wait().eq(7.0 + peer).all()
    assert first.wait().eq(peer).all()
    channels.wait_all_sends()


def test_transfers_in_both_directions_pass_each_other() -> None:
    on_ranks(2, send_both_ways)


def broadcast_from_the_last() -> None:
    axis = shared_axis(pp=dist.get_world_size())
    assert axis.shared is not None
    for size in SIZES:
        x = numbers(size, axis.rank)
        axis.shared.broadcast(x, axis.size - 1).wait()
        assert torch.equal(x, numbers(size, axis.size - 1))


def test_one_rank_gives_all_the_same() -> None:
    on_ranks(4, broadcast_from_the_last)


def different_sizes() -> str:
    axis = shared_axis(tp=2)
    try:
        collectives.all_reduce(torch.ones(4 + axis.rank), axis)
    except RuntimeError as error:
        return str(error)
    return "taken"


def test_ranks_that_do_not_do_the_same_are_told() -> None:
    assert on_ranks(2, different_sizes)[0] == "shared memory: 20 bytes came where 16 were expected"


def traces() -> list[str]:
    """Return this process's mappings of shared segments, and its open files of segments and of other processes."""
    mappings = [line for line in Path("/proc/self/maps").read_text().splitlines() if "memfd:megatron" in line]
    files = []
    for number in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # the listing's own is closed
            files.append(os.readlink(f"/proc/self/fd/{number}"))
    return mappings + [name for name in files if "memfd:megatron" in name or "pidfd" in name]


def build_and_drop() -> tuple[int, Counter[str]]:
    """Return the number of traces of three meshes, and those that are left after them."""
    gc.collect()
    before = Counter(traces())  # other tests' meshes in this process
    for _ in range(3):
        axis = shared_axis(tp=dist.get_world_size())
        collectives.all_reduce(torch.ones(5), axis)
    meanwhile = (Counter(traces()) - before).total()
    del axis
    gc.collect()
    return meanwhile, Counter(traces()) - before


def test_no_segment_and_no_file_is_left() -> None:
    for meanwhile, after in on_ranks(2, build_and_drop):
        assert meanwhile >= 3, "a mapping and two processes"
        assert not after


def refused_on_one(where: str) -> tuple[bool, float]:
    rank = dist.get_rank()
    with pytest.MonkeyPatch.context() as patched:
        if rank == 1 and where == "unsupported":
            patched.setattr(shared_opening, "unsupported", lambda: "a reason")
        if rank == 1 and where == "refused":
            patched.setattr(shared_opening, "_open", refuse)
        if rank == 1 and where == "no /proc":
            patched.setattr(shared_opening, "host_identity", refuse)
        if where == "hosts":
            patched.setattr(shared_opening, "host_identity", lambda: f"host {rank // 2}")
        mesh = Mesh.build(Grid(tp=2, dp=2), rank)
    if where == "hosts":
        assert mesh.tp.shared is not None, "both ranks are on one host"
    return mesh.dp.shared is None and mesh.world.shared is None, float(collectives.all_reduce(torch.ones(1), mesh.world))


def refuse(*_: object) -> str:
    raise OSError("not here")


@pytest.mark.parametrize("where", ["unsupported", "refused", "no /proc", "hosts"])
def test_gloo_carries_what_shared_memory_cannot(where: str) -> None:
    assert on_ranks(4, refused_on_one, where) == [(True, 4.0)] * 4


def test_it_can_be_turned_off() -> None:
    on_ranks(2, turned_off)


def turned_off() -> None:
    assert Mesh.build(Grid(tp=2), dist.get_rank(), shared_memory=False).tp.shared is None


# Ranks that end or stop.


def lose_the_other(how: str) -> tuple[str, float]:
    """Wait for a rank that takes no part; return the first rank's error, and the seconds until it came."""
    mesh = Mesh.build(Grid(tp=2), dist.get_rank(), timedelta(seconds=1.0))
    if mesh.rank == 1:
        return "", 0.0
    assert mesh.tp.shared is not None
    with subprocess.Popen(["sleep", "60"]) as other:  # in place of the rank itself, which a later test needs
        handle = os.pidfd_open(other.pid)
        os.dup2(handle, mesh.tp.shared.memory._lives[1])
        os.close(handle)
        if how == "killed":
            other.kill()
        begin = time.monotonic()
        try:
            collectives.all_reduce(torch.ones(3), mesh.tp)
        except RuntimeError as error:
            return str(error), time.monotonic() - begin
        finally:
            other.kill()
    return "it went on", 0.0


@pytest.mark.parametrize(("how", "why", "most"), [("killed", "rank 1 has ended", 0.9), ("stopped", "timed out", 10.0)])
def test_a_rank_that_is_lost_is_found(how: str, why: str, most: float) -> None:
    """Before the time limit if it died."""
    error, seconds = on_ranks(2, lose_the_other, how)[0]
    assert error.startswith(f"shared memory: connection closed by peer, {why}")
    assert seconds < most


def test_what_a_machine_needs() -> None:
    assert shared_memory.unsupported() is None
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("platform.machine", lambda: "aarch64")
        assert shared_memory.unsupported() == "it needs Linux on x86-64, not linux on aarch64"
