"""Collect the tokens of many documents in arrays that are appended to an indexed dataset at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass
class TokenColumn:
    """Tokens of one block of documents, for one key of their JSON objects.

    Attributes:
        empty: documents without tokens.
        longest_part: characters that the tokenizer was given at once, at most.
    """

    tokens: NDArray[Any]  # [tokens], of all documents
    lengths: NDArray[np.int64]  # [sequences], tokens of each
    sequences: NDArray[np.int64]  # [documents], sequences of each
    empty: int
    longest_part: int


class ColumnBuilder:
    """Builds a `TokenColumn` part of a sequence by part. begins, ends: ids that each document begins and ends with."""

    def __init__(self, documents: int, begins: list[int], ends: list[int], dtype: np.dtype[Any]) -> None:
        self._begins, self._ends, self._dtype = begins, ends, dtype
        self._tokens: list[NDArray[Any]] = []
        self._lengths: list[int] = []
        self._sequences = np.zeros(documents, np.int64)
        self._last: tuple[int, int] | None = None  # document and sequence of the last tokens
        self.longest_part = 0

    def append(self, document: int, sequence: int, ids: Sequence[int]) -> None:
        """Append tokens to a sequence of a document. No tokens change nothing: an empty document has no sequence.

        Args:
            document: number of the document in the block; never smaller than in the call before.
            sequence: number of the sequence in the document; likewise.
            ids: tokens of a part of the sequence.
        """
        if not ids:
            return
        begins = self._last is None or self._last[0] != document
        if begins and self._last is not None:
            self._add(self._ends)  # of the document before, which is known to be whole only now
        if self._last != (document, sequence):
            self._lengths.append(0)
            self._sequences[document] += 1
        if begins:
            self._add(self._begins)
        self._last = (document, sequence)
        self._add(ids)

    def _add(self, ids: Sequence[int]) -> None:
        self._lengths[-1] += len(ids)
        self._tokens.append(np.array(ids, self._dtype))

    def finish(self) -> TokenColumn:
        """Return the column; nothing can be appended afterwards."""
        if self._last is not None:
            self._add(self._ends)
        tokens = np.concatenate([np.empty(0, self._dtype), *self._tokens])  # [tokens]
        empty = int((self._sequences == 0).sum())
        return TokenColumn(tokens, np.array(self._lengths, np.int64), self._sequences, empty, self.longest_part)
