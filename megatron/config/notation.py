"""Parse the settings that have a notation of their own: shares, ranges, batch-size schedules, pipeline layouts. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal
from itertools import pairwise
from math import inf

SUFFIXES = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
# Lengths are bounded so that a hostile setting cannot make Decimal compute with a million digits.
NUMBER = re.compile(r"(\d{1,30}(?:\.\d{0,30})?(?:e\+?\d\d?)?)([kmbt]?)", re.IGNORECASE | re.ASCII)
MAX_SIGNS = 1 << 17  # characters of a layout when repetitions are written out: a `t` and a `|` for each of 65,536 layers
GROUP = re.compile(r"\(([^()]*)\)\*(\d{1,6})", re.ASCII)
REPEATED = re.compile(r"([^*()\d])\*(\d{1,6})", re.ASCII)
BatchSizeSteps = tuple[tuple[int, int], ...]  # (consumed samples, global batch size from there on), in order


def split_shares(split: str) -> list[float]:
    """Parse the shares of training, validation and test documents: `969,30,1`, `969/30/1` or `[969, 30, 1]`.

    Raises:
        ValueError: not one to three shares, a negative one, or all zero.
    """
    # A script that quotes twice leaves quotes in the value; Megatron-LM accepts them too.
    words = re.split(r"[,/\s]+", split.strip("'\"[]() \t,"))
    shares = [float(word) for word in words]
    if not (1 <= len(shares) <= 3 and all(0 <= share < inf for share in shares) and sum(shares) > 0):
        raise ValueError("give up to three shares, of training, validation and test, as in 969,30,1")
    return shares


def parse_iteration_ranges(words: Sequence[str]) -> tuple[range, ...]:
    """Parse iterations: each word is a number `N` or a range `A-B`, both ends included. ValueError names a wrong word."""
    found = []
    for word in words:
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", word)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not 1 <= first <= last:
            raise ValueError(f"has {word!r}, which is no iteration and no range of iterations")
        found.append(range(first, last + 1))
    return tuple(found)


def parse_steps(words: Sequence[str], seq_length: int) -> BatchSizeSteps:
    """Parse a --step-batch-size-schedule.

    Args:
        words: entries TOKENS:SIZE, separated by blanks or commas; each number may end in K, M, B or T.
        seq_length: tokens per sample.

    Returns:
        For each entry, in order, the number of consumed samples from which the size holds, and the size in samples.

    Raises:
        ValueError: an entry or their order is wrong.
    """
    steps: list[tuple[int, int]] = []
    for entry in " ".join(words).replace(",", " ").split():
        tokens, size = (_number(part) for part in entry.split(":")) if entry.count(":") == 1 else (None, None)
        if tokens is None or size is None:
            raise ValueError(f"has the entry {entry}, which is not TOKENS:SIZE, such as 0:768 or 250B:1536")
        if size != int(size) or not 0 < size <= 1 << 20:
            raise ValueError(f"has the size {entry.split(':')[1]}, which is not a whole number from 1 to 1,048,576")
        steps.append((int(tokens) // seq_length, int(size)))  # down to whole samples
    steps.sort(key=lambda step: step[0])
    if not steps or steps[0][0] != 0:
        raise ValueError("does not give the size at the start; its first entry is 0:SIZE")
    for (before, _), (after, _) in pairwise(steps):  # two entries of different tokens may be of one sample
        if before == after:
            raise ValueError(f"has two sizes from sample {before} on (tokens / `--seq-length {seq_length}`, rounded down)")
    return tuple(steps)


def _number(text: str) -> Decimal | None:
    """Parse a number with an optional suffix, as in 1.5K; None when it is not one."""
    found = NUMBER.fullmatch(text)
    return None if found is None else Decimal(found[1]) * SUFFIXES[found[2].lower()]


def parse_layout(text: str) -> tuple[int, ...]:
    """Parse a --pipeline-model-parallel-layout in Megatron-Core's notation.

    Stages are separated by `|`; E is the embedding, t a layer, L the loss. `x*3` is `xxx` and `(tt|)*2` is `tt|tt|`; commas
    and blanks are ignored.

    Returns:
        The number of layers of each stage.

    Raises:
        ValueError: the layout is wrong, or places what is not available.
    """
    plain = re.sub(r"[, ]", "", text)
    for pattern in (GROUP, REPEATED):
        # Measured before it is written out, so that a short text cannot fill the memory.
        if sum(len(found[1]) * int(found[2]) for found in pattern.finditer(plain)) > MAX_SIGNS:
            raise ValueError(f"is longer than {MAX_SIGNS:,} stages and layers")
        plain = pattern.sub(lambda found: found[1] * int(found[2]), plain)
    if "m" in plain:
        raise ValueError("places a layer of multi-token prediction, m, which is not available")
    if strange := sorted(set(plain) - set("EtL|")):
        raise ValueError(f"has {' '.join(strange)} where E, t, L, |, x*N or (xy)*N is expected")
    if not plain.startswith("E") or not plain.endswith("L") or plain.count("E") + plain.count("L") != 2:
        raise ValueError("does not begin with E, the embedding, and end with L, the loss, each once")
    return tuple(stage.count("t") for stage in plain.split("|"))
