"""Datasets that tests and the reference they were compared with make in the same way, from fixed random streams."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megatron.data.indexed import IndexedWriter


def corpus_recipe(number: int) -> list[list[np.ndarray]]:
    """Make the documents of an indexed dataset, each a list of sequences; some documents and sequences are empty."""
    random = np.random.RandomState(1000 + number)
    documents = []
    for _ in range(random.randint(20, 60)):
        sequences = random.randint(0, 4) if number % 2 else 1
        documents.append([random.randint(0, 60000, size=random.randint(0, 30)) for _ in range(sequences)])
    return documents


# (words of --data-path or the three separate ones, split, seed, sequence length, samples wanted per split)
BLENDS: list[tuple[list[str] | list[list[str]], str | None, int, int, tuple[int, int, int]]] = [
    (["p0"], "80,10,10", 1234, 8, (228, 40, 40)),
    (["1.0", "p0"], "80,10,10", 1234, 8, (228, 40, 40)),
    (["0.3", "p0", "0.7", "p1"], "90,10,0", 1, 4, (500, 20, 1)),
    (["0.2", "p0", "0.3", "p1", "0.5", "p2"], "1,1,1", 77, 31, (100, 100, 100)),
    (["p0", "p1", "p2"], "98,2", 9, 4, (90, 1, 1)),
    (["7", "p2", "1", "p1", "2", "p0", "0.01", "p1"], "100,0,0", 42, 16, (400, 1, 1)),
    ([["p0"], ["0.5", "p1", "0.5", "p2"], ["2", "p2"]], None, 5, 8, (200, 50, 60)),
]


def write_corpus(prefix: Path, documents: list[list[np.ndarray]], dtype: str = "<u2") -> str:
    """Write an indexed dataset, and return its prefix.

    Args:
        prefix: of its files.
        documents: each a list of sequences.
        dtype: of the tokens.
    """
    with IndexedWriter(str(prefix), np.dtype(dtype)) as writer:
        for sequences in documents:
            tokens = np.concatenate([np.empty(0, dtype=np.int64), *sequences])
            writer.add_document(tokens, [len(sequence) for sequence in sequences])
        writer.finish()
    return str(prefix)
