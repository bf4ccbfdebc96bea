"""BERT samples: two segments of consecutive sentences, perhaps swapped, with some of their tokens masked.

    [CLS] first segment [SEP] second segment [SEP]

Everything about sample i follows from the seed and i. Without the binary head there is one segment, and nothing is swapped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron.data.errors import DataError, ForeignIdError
from megatron.data.index_cache import Arrays, IndexCache
from megatron.data.indexed import IndexedDataset
from megatron.data.masking import MaskingRules, mask_tokens
from megatron.data.sentence_index import build_sentence_index

SPECIAL_TOKENS = 3  # [CLS] and two [SEP]


@dataclass(frozen=True)
class PairSample:
    """One sample, without padding.

    tokens: int64 `[n]`, what the model sees. labels: int64 `[n]`, what it should have been. guessed: bool `[n]`, where the
    model must guess. first: tokens of the first segment, with [CLS] and its [SEP]. swapped: whether the second segment's
    sentences stood before the first's.
    """

    tokens: NDArray[np.int64]
    labels: NDArray[np.int64]
    guessed: NDArray[np.bool_]
    first: int
    swapped: bool


@dataclass(frozen=True)
class PairRules:
    """How samples are made. longest: tokens of a sample, special ones included. short: share of those with a random, shorter
    length. pairs: two segments, for the binary head. cls, sep: ids. seed: of all random numbers."""

    longest: int
    short: float
    pairs: bool
    cls: int
    sep: int
    masking: MaskingRules
    seed: int


class BertDataset:
    """Samples from the documents `[first, last)` of an indexed dataset whose sequences are sentences, in training order.

    wanted: at least so many samples, or None for one epoch. cache: where the index is kept. Raises DataError when no document
    has sentences enough, and when a sample has an id outside of the vocabulary.
    """

    def __init__(
        self,
        indexed: IndexedDataset,
        documents: range,
        rules: PairRules,
        wanted: int | None,
        *,
        split: str = "training",
        cache: IndexCache | None = None,
    ) -> None:
        self.indexed, self.rules = indexed, rules
        at_least = 2 if rules.pairs else 1

        def build() -> Arrays:
            starts = np.asarray(indexed.documents[documents.start : documents.stop + 1], dtype=np.int64)
            longest = rules.longest - SPECIAL_TOKENS
            rows = build_sentence_index(
                starts,
                indexed.lengths,
                longest=longest,
                short=rules.short,
                seed=rules.seed,
                wanted=wanted,
                at_least=at_least,
            )
            return dict(rows=rows)

        key: dict[str, object] = dict(
            kind="sentences",
            documents=[documents.start, documents.stop],
            longest=rules.longest,
            short=rules.short,
            at_least=at_least,
            seed=rules.seed,
            wanted=wanted,
        )
        arrays = build() if cache is None or not documents else cache.get(indexed.prefix, key, build, indexed.idx_path)
        self.rows: NDArray[np.int64] = arrays["rows"]
        if not len(self.rows):
            raise DataError(
                f"{indexed.prefix}: the {split} split holds {len(documents)} documents, none of which has {at_least} sentences "
                "of up to 512 tokens; preprocess the text with --split-sentences, or give the split a larger share with --split"
            )

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> PairSample:
        if not 0 <= number < len(self):
            raise IndexError(f"sample {number} of {len(self)}")
        begin, end, target = self.rows[number].tolist()
        random = np.random.RandomState((self.rules.seed + number) % 2**32)
        return pair_sample([self._sentence(i) for i in range(begin, end)], target, self.rules, random)

    def locate(self, number: int, position: int) -> str:
        """Where sample `number` lies, in words: file, document, sentences. A swapped, cut pair tells no position."""
        begin, end, _ = self.rows[number].tolist()
        document = self._document(begin)
        first = begin - int(self.indexed.documents[document])
        return f"{self.indexed.bin_path}, document {document}, sentences {first} to {first + end - begin - 1}"

    def _sentence(self, number: int) -> list[int]:
        """Its ids. DataError, with file, document, sentence and token, for one outside of the vocabulary."""
        ids: list[int] = self.indexed[number].tolist()
        vocab_size = len(self.rules.masking.continues)
        wrong = next((place for place, token in enumerate(ids) if not 0 <= token < vocab_size), None)
        if wrong is not None:
            document = self._document(number)
            sentence = number - int(self.indexed.documents[document])
            raise ForeignIdError(
                f"{self.indexed.bin_path}, document {document}, sentence {sentence}, token {wrong}: id {ids[wrong]} is outside "
                f"of the vocabulary of {vocab_size} ids; the data was made with another tokenizer"
            )
        return ids

    def _document(self, sentence: int) -> int:
        return int(np.searchsorted(self.indexed.documents, sentence, side="right")) - 1


def pair_sample(sentences: Sequence[list[int]], target: int, rules: PairRules, random: np.random.RandomState) -> PairSample:
    """Return the sample that consecutive sentences make.

    Args:
        sentences: the ids of each; at least two for a pair.
        target: tokens that the segments have together at most.
        rules: how the sample is made.
        random: decides where the second segment begins, which one stands first, what is cut and what is masked.
    """
    pivot, swapped = len(sentences), False
    if rules.pairs:
        pivot = int(random.randint(1, len(sentences))) if len(sentences) > 2 else 1
        swapped = bool(random.random_sample() < 0.5)
    segments = [[t for s in part for t in s] for part in (sentences[:pivot], sentences[pivot:])]
    if swapped:
        segments.reverse()
    first, second = truncate_pair(segments[0], segments[1], target, random)
    whole = [rules.cls, *first, rules.sep, *([*second, rules.sep] if second else [])]
    seen, places = mask_tokens(whole, target, rules.masking, random)
    guessed = np.zeros(len(whole), dtype=np.bool_)
    guessed[places] = True
    return PairSample(np.array(seen, dtype=np.int64), np.array(whole, dtype=np.int64), guessed, len(first) + 2, swapped)


def truncate_pair(
    first: list[int], second: list[int], target: int, random: np.random.RandomState
) -> tuple[list[int], list[int]]:
    """Both segments, cut to `target` tokens together: always the longer one, at its front or its end by a coin."""
    (a, b), (c, d) = (0, len(first)), (0, len(second))
    while (b - a) + (d - c) > target:
        front = random.random_sample() < 0.5
        if b - a > d - c:
            a, b = (a + 1, b) if front else (a, b - 1)
        else:
            c, d = (c + 1, d) if front else (c, d - 1)
    return first[a:b], second[c:d]
