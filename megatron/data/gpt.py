"""GPT samples: `seq_length + 1` consecutive tokens, which may span several documents."""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from megatron.config.notation import split_shares
from megatron.data.errors import DataError
from megatron.data.index_cache import Arrays, IndexCache
from megatron.data.indexed import IndexedDataset
from megatron.data.sample_index import SampleIndex, build_sample_index

SPLITS = ("training", "validation", "test")


@dataclass(frozen=True)
class Sample:
    """One GPT sample. tokens: int64 `[seq + 1]`; all but the last are inputs, all but the first are labels."""

    tokens: NDArray[np.int64]


class SampleSource(Protocol):
    """A numbered set of samples of any kind."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> Any: ...

    def locate(self, number: int, position: int) -> str:
        """Return the place in the files of a sample's token at `position`, for a message."""
        ...


class GPTDataset:
    """Samples of `seq_length + 1` tokens from some sequences of an indexed dataset, in training order.

    `dataset[i]` is sample i of the shuffled order that the index stores.

    Args:
        indexed: the dataset on disk.
        sequences: numbers of the sequences to read.
        seq_length: input tokens of a sample.
        seed: seed of the shuffled order.
        num_samples: minimum number of samples; None for one epoch.
        split: name of the split, for messages.
        cache: stores the built index on disk; None builds it in memory.

    Raises:
        DataError: if the sequences have no tokens; `__getitem__` raises it if the cached index is damaged.
    """

    def __init__(
        self,
        indexed: IndexedDataset,
        sequences: range,
        seq_length: int,
        seed: int,
        num_samples: int | None,
        *,
        split: str = "training",
        cache: IndexCache | None = None,
    ) -> None:
        self.indexed, self.seq_length, self.cache = indexed, seq_length, cache

        def build() -> Arrays:
            numbers = np.arange(sequences.start, sequences.stop, dtype=np.int32)
            return asdict(build_sample_index(indexed.lengths, numbers, seq_length, seed, num_samples))

        # The cache's path is a digest of these names and values, so renaming one would rebuild every index.
        key: dict[str, object] = dict(
            sequences=[sequences.start, sequences.stop], seq_length=seq_length, seed=seed, wanted=num_samples
        )
        try:
            # For an empty split, `build` raises an error, so the cache is not used.
            arrays = build() if cache is None or not sequences else cache.get(indexed.prefix, key, build, indexed.idx_path)
        except DataError as error:
            raise DataError(
                f"{indexed.prefix}: the {split} split has {len(sequences)} of {len(indexed)} documents, with no tokens "
                f"to make {'any' if num_samples is None else num_samples} samples of {seq_length} tokens from; give it a "
                "larger share with --split, more data, or ask for no samples (--eval-iters 0)"
            ) from error
        self.index = SampleIndex(**arrays)

    def __len__(self) -> int:
        return len(self.index.shuffle)

    def __getitem__(self, number: int) -> Sample:
        if not 0 <= number < len(self):
            raise IndexError(f"sample {number} of {len(self)}")
        # The index may come from a damaged cache, so each number is checked before it is used as an index.
        self.indexed.check_unchanged()
        cut = int(self.index.shuffle[number])
        if not 0 <= cut < len(self.index.samples) - 1:
            raise self._damaged(f"sample {number} starts at cut {cut}")
        (place, start), (last, stop) = self.index.samples[cut].tolist(), self.index.samples[cut + 1].tolist()
        if not (0 <= place <= last < len(self.index.documents) and start >= 0 and stop >= 0):
            raise self._damaged(f"sample {number} reaches from {place}, {start} to {last}, {stop}")
        documents = self.index.documents[place : last + 1].tolist()
        if not (min(documents) >= 0 and max(documents) < len(self.indexed)):
            raise self._damaged(f"sample {number} reads the sequences {min(documents)} to {max(documents)}")
        tokens = np.empty(self.seq_length + 1, dtype=np.int64)  # [seq + 1]
        filled = 0
        for i, document in enumerate(documents):
            # One token more than the next cut: the label of the last input.
            part = self.indexed.get(document, start if i == 0 else 0, stop + 1 if i == last - place else None)
            if filled + len(part) > len(tokens):
                raise self._damaged(f"sample {number} has more than {len(tokens)} tokens")
            tokens[filled : filled + len(part)] = part
            filled += len(part)
        if filled != len(tokens):
            raise self._damaged(f"sample {number} has {filled} tokens")
        return Sample(tokens)

    def _damaged(self, problem: str) -> DataError:
        """Return the error for an index that does not fit the dataset."""
        where = "" if self.cache is None else f" in {self.cache.folder(self.indexed.prefix)}"
        return DataError(f"{self.indexed.prefix}: its index cache{where} is damaged: {problem}; delete it")

    def locate(self, number: int, position: int) -> str:
        """Return the place of token `position` of a sample, for a message: file, document, token."""
        place, start = self.index.samples[int(self.index.shuffle[number])].tolist()
        while True:
            sequence = int(self.index.documents[place])
            remaining = int(self.indexed.lengths[sequence]) - start
            if position < remaining:
                document = int(np.searchsorted(self.indexed.documents, sequence, side="right")) - 1
                return f"{self.indexed.bin_path}, document {document}, token {start + position}"
            place, start, position = place + 1, 0, position - remaining


def parse_split(split: str) -> list[tuple[float, float] | None]:
    """Return start and end of the three splits in a text like "969,30,1", as fractions from 0 to 1; None if one is empty.

    The splits are training, validation and test. The arithmetic is Megatron-Core 0.16's to the last bit, since the borders are
    rounded to whole documents.
    """
    try:
        shares = split_shares(split)
    except ValueError:
        raise DataError(f"--split {split}: give up to three shares, of training, validation and test, as in 969,30,1") from None
    weights = np.array(shares + [0.0] * (3 - len(shares)), dtype=np.float64)
    borders: list[float] = [0.0]
    for weight in (weights / np.sum(weights)).tolist():
        borders.append(borders[-1] + weight)
    return [None if end <= begin else (begin, end) for begin, end in itertools.pairwise(borders)]


def split_range(share: tuple[float, float], sequences: int) -> range:
    """Return the numbers of the sequences in one split; its borders are rounded half to even."""
    return range(round(share[0] * float(sequences)), round(share[1] * float(sequences)))
