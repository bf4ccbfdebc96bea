"""Parse settings that have their own notation: shares of a split, ranges, batch-size schedules and pipeline layouts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal
from itertools import pairwise
from math import inf

SUFFIXES = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
# The pattern bounds the number of digits, so that no setting makes Decimal compute with a million of them.
NUMBER = re.compile(r"(\d{1,30}(?:\.\d{0,30})?(?:e\+?\d\d?)?)([kmbt]?)", re.IGNORECASE | re.ASCII)
MAX_SIGNS = 1 << 17  # characters of a layout after repetitions are expanded: a `t` and a `|` for each of 65,536 layers
GROUP = re.compile(r"\(([^()]*)\)\*(\d{1,6})", re.ASCII)
REPEATED = re.compile(r"([^*()\d])\*(\d{1,6})", re.ASCII)
BatchSizeSteps = tuple[tuple[int, int], ...]  # in order: (consumed samples from which a size applies, global batch size)


def split_shares(split: str) -> list[float]:
    """Parse the shares of training, validation and test documents: `969,30,1`, `969/30/1` or `[969, 30, 1]`.

    Raises:
        ValueError: there are not one to three shares, a share is negative, or all are zero.
    """
    # Quotes are stripped, as by Megatron-LM: scripts that quote twice leave them in the value.
    words = re.split(r"[,/\s]+", split.strip("'\"[]() \t,"))
    shares = [float(word) for word in words]
    if not (1 <= len(shares) <= 3 and all(0 <= share < inf for share in shares) and sum(shares) > 0):
        raise ValueError("give up to three shares, of training, validation and test, as in 969,30,1")
    return shares


def parse_iteration_ranges(words: Sequence[str]) -> tuple[range, ...]:
    """Parse iterations. Each word is a number `N`, or a range `A-B` that includes both ends. ValueError names a wrong word."""
    ranges = []
    for word in words:
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", word)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not 1 <= first <= last:
            raise ValueError(f"has {word!r}, which is neither an iteration nor a range of iterations")
        ranges.append(range(first, last + 1))
    return tuple(ranges)


def parse_steps(words: Sequence[str], seq_length: int) -> BatchSizeSteps:
    """Parse a --step-batch-size-schedule.

    Args:
        words: entries TOKENS:SIZE, separated by blanks or commas; each number may end in K, M, B or T.
        seq_length: tokens per sample.

    Returns:
        The entries, sorted: the number of consumed samples from which a size applies, and the size in samples.

    Raises:
        ValueError: an entry is wrong, none begins at 0, or two have the same beginning.
    """
    steps: list[tuple[int, int]] = []
    for entry in " ".join(words).replace(",", " ").split():
        tokens, size = (_number(part) for part in entry.split(":")) if entry.count(":") == 1 else (None, None)
        if tokens is None or size is None:
            raise ValueError(f"has the entry {entry}, which is not TOKENS:SIZE, such as 0:768 or 250B:1536")
        if size != int(size) or not 0 < size <= 1 << 20:
            raise ValueError(f"has the size {entry.split(':')[1]}, which is not a whole number from 1 to 1,048,576")
        steps.append((int(tokens) // seq_length, int(size)))  # tokens are rounded down to whole samples
    steps.sort(key=lambda step: step[0])
    if not steps or steps[0][0] != 0:
        raise ValueError("does not give the size at the start; its first entry is 0:SIZE")
    for (before, _), (after, _) in pairwise(steps):  # rounding may give two entries the same number of samples
        if before == after:
            raise ValueError(f"has two sizes from sample {before} on (tokens / `--seq-length {seq_length}`, rounded down)")
    return tuple(steps)


def _number(text: str) -> Decimal | None:
    """Parse a number with an optional suffix, as in 1.5K; None if it is not one."""
    match = NUMBER.fullmatch(text)
    return None if match is None else Decimal(match[1]) * SUFFIXES[match[2].lower()]


def parse_layout(text: str) -> tuple[int, ...]:
    """Parse a --pipeline-model-parallel-layout in Megatron-Core's notation.

    Stages are separated by `|`; E is the embedding, t a layer, L the loss. `x*3` is `xxx` and `(tt|)*2` is `tt|tt|`; commas
    and blanks are ignored.

    Returns:
        The number of layers of each stage.

    Raises:
        ValueError: the layout is wrong, or contains a layer of multi-token prediction, which is not available.
    """
    expanded = re.sub(r"[, ]", "", text)
    for pattern in (GROUP, REPEATED):
        # The length is computed before the expansion, so that a short text cannot exhaust the memory.
        if sum(len(match[1]) * int(match[2]) for match in pattern.finditer(expanded)) > MAX_SIGNS:
            raise ValueError(f"is longer than {MAX_SIGNS:,} stages and layers")
        expanded = pattern.sub(lambda match: match[1] * int(match[2]), expanded)
    if "m" in expanded:
        raise ValueError("places a layer of multi-token prediction, m, which is not available")
    if unexpected := sorted(set(expanded) - set("EtL|")):
        raise ValueError(f"has {' '.join(unexpected)} where E, t, L, |, x*N or (xy)*N is expected")
    if not expanded.startswith("E") or not expanded.endswith("L") or expanded.count("E") + expanded.count("L") != 2:
        raise ValueError("does not begin with E, the embedding, and end with L, the loss, each once")
    return tuple(stage.count("t") for stage in expanded.split("|"))
