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
        empty: number of documents without tokens.
        longest_part: length of the longest text that the tokenizer was given at once, in characters.
    """

    tokens: NDArray[Any]  # [tokens], of all documents
    lengths: NDArray[np.int64]  # [sequences], tokens of each
    sequences: NDArray[np.int64]  # [documents], sequences of each
    empty: int
    longest_part: int


class ColumnBuilder:
    """Builds a `TokenColumn` from parts of sequences. begins, ends: ids put before and after the tokens of each document."""

    def __init__(self, documents: int, begins: list[int], ends: list[int], dtype: np.dtype[Any]) -> None:
        self._begins, self._ends, self._dtype = begins, ends, dtype
        self._tokens: list[NDArray[Any]] = []
        self._lengths: list[int] = []
        self._sequences = np.zeros(documents, np.int64)
        self._last: tuple[int, int] | None = None  # document and sequence of the last tokens
        self.longest_part = 0

    def append(self, document: int, sequence: int, ids: Sequence[int]) -> None:
        """Append tokens to a sequence of a document. Without ids it does nothing, so an empty document has no sequence.

        Args:
            document: number of the document in the block; never smaller than in the call before.
            sequence: number of the sequence in the document; never smaller than in the call before for the same document.
            ids: tokens of a part of the sequence.
        """
        if not ids:
            return
        starts_document = self._last is None or self._last[0] != document
        if starts_document and self._last is not None:
            self._add(self._ends)  # end the previous document, which is known to be complete only now
        if self._last != (document, sequence):
            self._lengths.append(0)
            self._sequences[document] += 1
        if starts_document:
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
