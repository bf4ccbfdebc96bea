"""Buckets and slices of flat memory as rectangles: checked element by element against lists of all places."""

from __future__ import annotations

import random
from itertools import pairwise, product
from math import prod

import pytest

from megatron.config.optimizers import SGD
from megatron.optim.sharding import owned_slice, param_ranges, rectangles
from megatron.parallel.buckets import ALIGN, buckets, round_up
from megatron.plan.state_size import state_bytes


def places(start: tuple[int, ...], shape: tuple[int, ...], whole: tuple[int, ...]) -> list[int]:
    """The flattened numbers of a rectangle's elements, in its own order."""
    found = []
    for index in product(*(range(a, a + n) for a, n in zip(start, shape, strict=True))):
        number = 0
        for i, n in zip(index, whole, strict=True):
            number = number * n + i
        found.append(number)
    return found


@pytest.mark.parametrize("shape", [(), (1,), (7,), (1, 1), (5, 4), (4, 1), (1, 6), (3, 2, 4), (2, 3, 2, 2)])
def test_rectangles_are_the_slice_in_order(shape: tuple[int, ...]) -> None:
    """Every slice of every shape: together exactly its elements, and each rectangle's follow one another in memory."""
    most = 1 if len(shape) < 2 else 2 * len(shape) - 1
    for low in range(prod(shape) + 1):
        for high in range(low, prod(shape) + 1):
            found = list(rectangles(shape, low, high))
            assert len(found) <= most and all(r.size > 0 for r in found)
            assert [r.first for r in found] == [places(r.start, r.shape, shape)[0] for r in found]
            assert [n for r in found for n in places(r.start, r.shape, shape)] == list(range(low, high))


def test_a_slice_of_a_matrix_is_at_most_three_rectangles() -> None:
    first, middle, last = rectangles((5, 4), 3, 18)
    assert (first.start, first.shape) == ((0, 3), (1, 1))
    assert (middle.start, middle.shape) == ((1, 0), (3, 4))
    assert (last.start, last.shape, last.first) == ((4, 0), (1, 2), 16)
    assert [r.shape for r in rectangles((5, 4), 0, 20)] == [(5, 4)]  # whole tensors stay whole


@pytest.mark.parametrize(("low", "high"), [(-1, 2), (3, 2), (0, 13)])
def test_a_slice_outside_the_tensor_is_refused(low: int, high: int) -> None:
    with pytest.raises(ValueError, match="of a tensor of shape"):
        list(rectangles((3, 4), low, high))


def test_buckets_hold_every_parameter_once() -> None:
    draw = random.Random(3)
    for _ in range(300):
        sizes = [draw.randint(1, 400) for _ in range(draw.randint(1, 12))]
        kinds = [draw.choice("ab") for _ in sizes]
        limit, shards = draw.choice([None, 1, 256, 1000]), draw.choice([1, 2, 3, 8])
        found = buckets(sizes, kinds, limit, shards)
        assert sorted(i for b in found for i in b.members) == list(range(len(sizes)))
        for bucket in found:
            assert len({kinds[i] for i in bucket.members}) == 1
            assert bucket.length % (ALIGN * shards) == 0
            filled = sum(round_up(sizes[i]) for i in bucket.members)
            assert limit is None or len(bucket.members) == 1 or filled <= limit
            assert list(bucket.members) == sorted(bucket.members, reverse=True)
            ends = [o + sizes[i] for o, i in zip(bucket.offsets, bucket.members, strict=True)]
            assert all(o % ALIGN == 0 for o in bucket.offsets) and ends[-1] <= bucket.length < filled + ALIGN * shards
            assert all(end <= o for end, o in zip(ends, bucket.offsets[1:], strict=False))
        # A bucket is complete with the first parameter of the forward pass that it has: in that order they come.
        assert [b.members[-1] for b in found] == sorted((b.members[-1] for b in found), reverse=True)


def test_without_a_limit_a_kind_is_one_bucket() -> None:
    found = {b.members for b in buckets([64, 64, 64, 64], "abab")}
    assert found == {(2, 0), (3, 1)}
    assert [b.members for b in buckets([64] * 4, "aaaa", 128)] == [(3, 2), (1, 0)]
    assert [b.members for b in buckets([10, 500, 10], "aaa", 128)] == [(2,), (1,), (0,)]


def test_slices_share_a_bucket_without_gap_or_overlap() -> None:
    draw = random.Random(4)
    for _ in range(200):
        sizes = [draw.randint(1, 300) for _ in range(draw.randint(1, 6))]
        shards = draw.choice([1, 2, 3, 4])
        (bucket,) = buckets(sizes, [0] * len(sizes), None, shards)
        inside = [draw.randint(0, sizes[i]) for i in bucket.members]  # without padding at the end
        seen: list[tuple[int, int]] = []
        for shard in range(shards):
            own = owned_slice(bucket.length, shards, shard)
            assert own.stop - own.start == bucket.length // shards
            for s in param_ranges(bucket.offsets, inside, own):
                assert bucket.offsets[s.member] + s.low == own.start + s.slice_offset
                assert s.slice_offset >= 0 and s.slice_offset + s.high - s.low <= own.stop - own.start
                seen += [(s.member, n) for n in range(s.low, s.high)]
        assert seen == sorted(set(seen)) and len(seen) == sum(inside)


def test_parameters_that_must_stay_whole_are_cut_by_no_slice() -> None:
    draw = random.Random(5)
    for _ in range(200):
        sizes = [draw.randint(1, 900) for _ in range(draw.randint(1, 12))]
        kinds = [draw.choice("ab") for _ in sizes]
        limit, shards = draw.choice([None, 1, 1000]), draw.choice([1, 2, 3, 4])
        plain, found = buckets(sizes, kinds, limit, shards), buckets(sizes, kinds, limit, shards, whole="a")
        if shards == 1:
            assert found == plain
            continue
        assert [b for b in found if kinds[b.members[0]] == "b"] == [b for b in plain if kinds[b.members[0]] == "b"]
        assert sorted(i for b in found for i in b.members) == list(range(len(sizes)))
        matrices = [b for b in found if kinds[b.members[0]] == "a"]
        assert len(matrices) == ("a" in kinds)
        for bucket in matrices:
            share = bucket.length // shards
            assert bucket.length == share * shards and share % ALIGN == 0
            places = [(o, o + sizes[i]) for i, o in zip(bucket.members, bucket.offsets, strict=True)]
            assert all(o % ALIGN == 0 and o // share == (end - 1) // share for o, end in places)
            assert all(end <= o for (_, end), (o, _) in pairwise(places))
            # No slice is longer than an even share and the largest parameter.
            filled = [round_up(sizes[i]) for i in bucket.members]
            assert share <= sum(filled) / shards + max(filled)


def test_ranks_that_cannot_share_evenly_are_refused() -> None:
    with pytest.raises(ValueError, match="130 elements do not divide over 4 ranks"):
        owned_slice(130, 4, 0)


@pytest.mark.parametrize("shards", [1, 2, 8])
def test_bytes_of_a_parameter(shards: int) -> None:
    """6 + 12 / d in 16 bit and 8 + 8 / d in fp32, of elements that no padding rounds up."""
    count = ALIGN * 8 * 3
    for is_16bit, each in ((True, 6 + 12 / shards), (False, 8 + 8 / shards)):
        state = state_bytes([count], [0], is_16bit=is_16bit, shards=shards)
        assert state.weights + state.gradients + state.optimizer == count * each
    half = state_bytes([count], [0], is_16bit=True, shards=shards, bf16_gradients=True)
    assert half.weights + half.gradients + half.optimizer == count * (4 + 12 / shards)
    sgd = state_bytes([count], [0], is_16bit=True, rules=[SGD], shards=shards)
    assert sgd.optimizer * 2 == state_bytes([count], [0], is_16bit=True, shards=shards).optimizer
