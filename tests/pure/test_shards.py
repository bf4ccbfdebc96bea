"""The slice algebra, against numpy: any tiling into any other, and who writes what."""

import random
import time
from math import prod
from typing import NamedTuple

import numpy as np
import pytest

from megatron.checkpoint.shards import assign_evenly, coverage_error, find_copies, overlap


class Part(NamedTuple):
    start: tuple[int, ...]
    shape: tuple[int, ...]


def random_tiling(rng: random.Random, shape: tuple[int, ...], cuts: int) -> list[Part]:
    """Disjoint rectangles that cover `shape`, cut at random places; not a grid."""
    parts = [Part((0,) * len(shape), shape)]
    for _ in range(cuts):
        i = rng.randrange(len(parts))
        start, size = parts[i]
        d = rng.randrange(len(shape))
        if size[d] < 2:
            continue
        at = rng.randrange(1, size[d])
        low = tuple(at if k == d else n for k, n in enumerate(size))
        high = tuple(size[d] - at if k == d else n for k, n in enumerate(size))
        parts[i : i + 1] = [Part(start, low), Part(tuple(a + at * (k == d) for k, a in enumerate(start)), high)]
    rng.shuffle(parts)
    return parts


def slice_part(array: np.ndarray, part: Part) -> np.ndarray:
    return array[tuple(slice(a, a + n) for a, n in zip(part.start, part.shape, strict=True))]


@pytest.mark.parametrize("seed", range(40))
def test_any_tiling_fills_any_other(seed):
    rng = random.Random(seed)
    shape = tuple(rng.randrange(1, 12) for _ in range(rng.randrange(1, 4)))
    whole = np.arange(prod(shape)).reshape(shape)
    saved, wanted = random_tiling(rng, shape, rng.randrange(12)), random_tiling(rng, shape, rng.randrange(12))
    assert coverage_error(shape, saved) is None and coverage_error(shape, wanted) is None
    held = [slice_part(whole, p) for p in saved]
    for part in wanted:
        target = np.full(part.shape, -1)
        for copy in find_copies(part, saved):
            assert (target[copy.target] == -1).all()  # nothing is copied twice
            target[copy.target] = held[copy.piece][copy.source]
        np.testing.assert_array_equal(target, slice_part(whole, part))


@pytest.mark.parametrize("seed", range(20))
def test_a_spoilt_tiling_is_found(seed):
    rng = random.Random(seed)
    shape = (9, 7)
    saved = random_tiling(rng, shape, 8)
    i = rng.randrange(len(saved))
    start, size = saved[i]
    assert "hold" in coverage_error(shape, saved[:i] + saved[i + 1 :])
    assert "overlap" in coverage_error(shape, [*saved, Part(start, (1, 1))])
    assert "outside" in coverage_error(shape, [*saved[:i], Part(start, (size[0] + 9, size[1])), *saved[i + 1 :]])
    assert "outside" in coverage_error(shape, [*saved[:i], Part((-1, 0), (1, 1)), *saved[i + 1 :]])
    assert "dimensions" in coverage_error(shape, [Part((0,), (9,))])
    with pytest.raises(ValueError, match="do not cover"):
        find_copies(Part((0, 0), shape), saved[:i] + saved[i + 1 :])


def test_a_scalar_is_one_piece():
    scalar = Part((), ())
    assert coverage_error((), [scalar]) is None
    assert [c.elements for c in find_copies(scalar, [scalar])] == [1]
    assert "overlap" in coverage_error((), [scalar, scalar])


def test_touching_rectangles_do_not_overlap():
    assert overlap(0, Part((0, 0), (4, 4)), Part((4, 0), (4, 4))) is None
    assert overlap(0, Part((0, 0), (4, 4)), Part((3, 3), (4, 4))).elements == 1


def test_a_thousand_row_slices_are_cheap():
    rows = [Part((i, 0), (1, 8)) for i in range(5000)]
    assert coverage_error((5000, 8), rows) is None


def test_a_hostile_list_of_pieces_takes_no_longer():
    """Columns all lie side by side in a sweep along the rows: comparing each with each would take minutes."""
    columns = [Part((0, i), (8, 1)) for i in range(20000)]
    began = time.process_time()
    assert coverage_error((8, 20000), columns) is None
    assert "overlap" in coverage_error((8, 20000), [*columns[:-1], Part((0, 9999), (8, 1))])
    assert time.process_time() - began < 20


@pytest.mark.parametrize(("tp", "dp"), [(1, 1), (4, 1), (1, 16), (8, 16)])
def test_writers_are_holders_and_share_evenly(tp, dp):
    rng = random.Random(tp * 100 + dp)
    sizes, holders = [], []
    for _ in range(200):
        size = rng.randrange(1, 1000)
        if rng.random() < 0.5:  # cut over tp, equal over dp
            for t in range(tp):
                sizes.append(size)
                holders.append([d * tp + t for d in range(dp)])
        else:  # equal everywhere
            sizes.append(size)
            holders.append(list(range(tp * dp)))
    writers = assign_evenly(sizes, holders)
    assert all(w in h for w, h in zip(writers, holders, strict=True))
    load = [sum(s for s, w in zip(sizes, writers, strict=True) if w == r) for r in range(tp * dp)]
    assert max(load) - min(load) <= max(sizes)
    assert writers == assign_evenly(sizes, [list(reversed(h)) for h in holders]), "the order of the holders must not matter"


def test_a_piece_with_one_holder_counts_in_that_holders_load():
    assert assign_evenly([100, 10, 10], [[0], [0, 1], [0, 1]]) == [0, 1, 1]


def test_the_heaviest_pieces_are_given_first():
    writers = assign_evenly([1, 1, 1, 1, 4], [[0, 1]] * 5)
    assert writers[:4] == [1] * 4 and writers[4] == 0
