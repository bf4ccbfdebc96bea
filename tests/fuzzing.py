"""Damaged files for fuzzing: a good one, and edits that hypothesis chooses and shrinks.

How many inputs are tried: so many as the suite has time for, or as FUZZ_EXAMPLES says.

    FUZZ_EXAMPLES=50000 python -m pytest tests/checkpoint/test_fuzz_checkpoint.py tests/data/test_fuzz_index.py
"""

from __future__ import annotations

import os
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

EXAMPLES = "FUZZ_EXAMPLES"
# Numbers at which formats break: around nothing, around the ends of every width, and beyond all of them.
EDGES = [0, 1, 2, 3, 7, 8, 9] + [(1 << bits) + by for bits in (7, 8, 15, 16, 31, 32, 33, 53, 62, 63) for by in (-1, 0, 1)]
INTEGERS = st.sampled_from([*EDGES, *(-n for n in EDGES), 10**30]) | st.integers(-100, 100)
# What JSON can hold in place of anything.
JSON_VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | INTEGERS | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8)
    | st.sampled_from(["", ".", "..", "../x", "/etc/passwd", "a\0b", "\ud800", "F32", "BOOL", "manifest.json"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


def fuzz_settings(short: int) -> settings:
    """Return the settings of a fuzz test that tries `short` inputs in the suite, the same ones every time."""
    count = int(os.environ.get(EXAMPLES, "0")) or short
    return settings(max_examples=count, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))


def damaged_bytes(good: bytes) -> st.SearchStrategy[bytes]:
    """Draw the bytes of a file after one to four edits: a byte, a number, a cut, a repetition, something foreign in between."""
    at = st.integers(0, len(good))
    edit = st.one_of(
        st.tuples(st.just("byte"), at, st.integers(0, 255)),
        st.tuples(st.just("number"), at, st.sampled_from([4, 8]), INTEGERS),
        st.tuples(st.just("cut"), at, at),
        st.tuples(st.just("repeat"), at, at),
        st.tuples(st.just("insert"), at, st.binary(min_size=1, max_size=12)),
        st.tuples(st.just("digits"), at, INTEGERS),
    )
    return st.lists(edit, min_size=1, max_size=4).map(lambda edits: apply_edits(good, edits))


def apply_edits(good: bytes, edits: list[tuple[Any, ...]]) -> bytes:
    """Apply edits to the bytes of a file, one after the other."""
    data = bytearray(good)
    for kind, at, *more in edits:
        if kind == "byte" and at < len(data):
            data[at] = more[0]
        elif kind == "number":
            width, value = more
            data[at : at + width] = (value % (1 << 8 * width)).to_bytes(width, "little")
        elif kind == "cut":
            del data[min(at, more[0]) : max(at, more[0])]
        elif kind == "repeat":
            data[at:at] = data[min(at, more[0]) : max(at, more[0])]
        elif kind == "insert":
            data[at:at] = more[0]
        elif kind == "digits":
            data[at:at] = str(more[0]).encode()
    return bytes(data)


def json_paths(value: Any, way: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """List every place in a JSON value, as the keys and numbers that lead there."""
    found = [way] if way else []
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in inner:
        found += json_paths(each, (*way, key))
    return found


def set_at_path(value: Any, way: tuple[Any, ...], new: Any) -> None:
    """Put `new` at one place of a JSON value; nothing happens where an earlier change took the place away.

    Args:
        value: a list or dictionary, which is changed.
        way: the keys and numbers that lead to the place.
        new: what stands there afterwards.
    """
    for key in way[:-1]:
        try:
            value = value[key]
        except (KeyError, IndexError, TypeError):
            return
    if isinstance(value, dict) or (isinstance(value, list) and isinstance(way[-1], int) and way[-1] < len(value)):
        value[way[-1]] = new
