"""Inputs of BERT's sample index and masking that tests and the reference they were compared with make alike."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

VOCAB, CLS, SEP, MASK = 300, 2, 3, 4
MAX_LENGTH = 64


@dataclass(frozen=True)
class IndexCase:
    """Arguments of `build_sentence_index`."""

    documents: np.ndarray
    lengths: np.ndarray
    longest: int
    short: float
    seed: int
    wanted: int | None
    at_least: int


def index_cases(count: int = 400) -> Iterator[IndexCase]:
    """Draw documents of 0 to 8 sentences, some with one that is too long; only those of which samples can be made."""
    random = np.random.RandomState(0)
    for number in range(count):
        counts = random.randint(0, 9, random.randint(1, 30))
        starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        lengths = random.randint(1, 40, max(int(starts[-1]), 1)).astype(np.int32)[: starts[-1]]
        if number % 5 == 0 and len(lengths):
            lengths[random.randint(0, len(lengths))] = 600
        longest, short = int(random.randint(5, 100)), float(random.choice([0.0, 0.1, 0.3, 0.5, 1.0]))
        seed, at_least = int(random.randint(0, 10**6)), int(random.randint(1, 3))
        wanted = [None, 1, 5, 50, 300][random.randint(0, 5)]
        usable = [
            n for n, begin in zip(counts, starts, strict=False)
            if n >= at_least and (n == 1 or lengths[begin : begin + n].max() <= 512)
        ]  # fmt: skip
        if usable:
            yield IndexCase(starts, lengths, longest, short, seed, wanted, at_least)


@dataclass(frozen=True)
class PairCase:
    """Sample number 7 of a dataset: its sentences, its target length, and the run's seed."""

    sentences: list[list[int]]
    target: int
    seed: int
    pairs: bool


def continuation_ids() -> np.ndarray:
    """Mark the ids that continue a word: every fourth."""
    return np.array([i % 4 == 3 and i > 10 for i in range(VOCAB)])


def pair_cases(count: int = 300) -> Iterator[PairCase]:
    """Draw samples of one or two segments."""
    random = np.random.RandomState(1)
    for number in range(count):
        seed, target = int(random.randint(0, 10**6)), int(random.choice([61, 61, 20, 5, 2]))
        sentences = [random.randint(5, VOCAB, random.randint(1, 25)).tolist() for _ in range(random.randint(2, 9))]
        yield PairCase(sentences, target, seed, bool(number % 2))


def digest(values: Any) -> str:
    """Return a short checksum of values, through JSON."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]
