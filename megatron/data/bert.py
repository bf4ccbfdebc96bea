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
    """One sample of BERT, without padding.

    Attributes:
        tokens: int64 `[n]`, the ids that the model sees.
        labels: int64 `[n]`, the ids before masking.
        loss_mask: bool `[n]`, the positions to predict.
        first_length: tokens of the first segment, with [CLS] and its [SEP].
        swapped: whether the second segment's sentences stood before the first's.
    """

    tokens: NDArray[np.int64]
    labels: NDArray[np.int64]
    loss_mask: NDArray[np.bool_]
    first_length: int
    swapped: bool


@dataclass(frozen=True)
class PairRules:
    """Settings by which sentences become samples.

    Attributes:
        max_length: tokens of a sample, special ones included.
        short_seq_prob: share of samples with a random, shorter length.
        binary_head: make two segments, for the model's binary head. cls, sep: ids of [CLS] and [SEP].
        seed: seed of all random numbers.
    """

    max_length: int
    short_seq_prob: float
    binary_head: bool
    cls: int
    sep: int
    masking: MaskingRules
    seed: int


class BertDataset:
    """Samples from the documents `[first, last)` of an indexed dataset whose sequences are sentences, in training order.

    Args:
        indexed: the dataset on disk; its sequences are sentences.
        documents: numbers of the documents to read.
        rules: settings of the samples.
        num_samples: least number of samples; None for one epoch.
        split: name of the split, for messages.
        cache: keeps the built index; None builds it in memory.

    Raises:
        DataError: when no document has sentences enough; from `__getitem__`, for an id outside of the vocabulary.
    """

    def __init__(
        self,
        indexed: IndexedDataset,
        documents: range,
        rules: PairRules,
        num_samples: int | None,
        *,
        split: str = "training",
        cache: IndexCache | None = None,
    ) -> None:
        self.indexed, self.rules = indexed, rules
        min_sentences = 2 if rules.binary_head else 1

        def build() -> Arrays:
            starts = np.asarray(indexed.documents[documents.start : documents.stop + 1], dtype=np.int64)
            rows = build_sentence_index(
                starts,
                indexed.lengths,
                max_tokens=rules.max_length - SPECIAL_TOKENS,
                short_prob=rules.short_seq_prob,
                seed=rules.seed,
                num_samples=num_samples,
                min_sentences=min_sentences,
            )
            return dict(rows=rows)

        # These names are part of the name of a cache on disk: another spelling would build every index anew.
        key: dict[str, object] = dict(
            kind="sentences",
            documents=[documents.start, documents.stop],
            longest=rules.max_length,
            short=rules.short_seq_prob,
            at_least=min_sentences,
            seed=rules.seed,
            wanted=num_samples,
        )
        arrays = build() if cache is None or not documents else cache.get(indexed.prefix, key, build, indexed.idx_path)
        self.rows: NDArray[np.int64] = arrays["rows"]  # [samples, 3]: first sentence, end, target tokens
        if not len(self.rows):
            raise DataError(
                f"{indexed.prefix}: the {split} split holds {len(documents)} documents, none of which has {min_sentences} "
                "sentences of up to 512 tokens; preprocess the text with --split-sentences, or give the split a larger "
                "share with --split"
            )

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> PairSample:
        if not 0 <= number < len(self):
            raise IndexError(f"sample {number} of {len(self)}")
        begin, end, target = self.rows[number].tolist()
        # A generator for each sample, so that no order of reading and no layout shows in the masks.
        random = np.random.RandomState((self.rules.seed + number) % 2**32)
        return pair_sample([self._sentence(i) for i in range(begin, end)], target, self.rules, random)

    def locate(self, number: int, position: int) -> str:
        """Return where a sample lies, for a message: file, document, sentences. A swapped, cut pair tells no position."""
        begin, end, _ = self.rows[number].tolist()
        document = self._document(begin)
        first = begin - int(self.indexed.documents[document])
        return f"{self.indexed.bin_path}, document {document}, sentences {first} to {first + end - begin - 1}"

    def _sentence(self, number: int) -> list[int]:
        """Return the ids of a sentence; ForeignIdError, with its place, for one outside of the vocabulary."""
        ids: list[int] = self.indexed[number].tolist()
        vocab_size = len(self.rules.masking.is_continuation)
        wrong = next((position for position, token in enumerate(ids) if not 0 <= token < vocab_size), None)
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
    """Return the sample that consecutive sentences make, masked.

    Args:
        sentences: the ids of each; at least two for a pair.
        target: largest number of tokens of both segments together.
        rules: settings of the sample.
        random: decides where the second segment begins, which one stands first, what is cut and what is masked.
    """
    # The random numbers are drawn in Megatron-LM's order, so that the same data give the same samples.
    pivot, swapped = len(sentences), False
    if rules.binary_head:
        pivot = int(random.randint(1, len(sentences))) if len(sentences) > 2 else 1
        swapped = bool(random.random_sample() < 0.5)
    segments = [[t for s in part for t in s] for part in (sentences[:pivot], sentences[pivot:])]
    if swapped:
        segments.reverse()
    first, second = truncate_pair(segments[0], segments[1], target, random)
    labels = [rules.cls, *first, rules.sep, *([*second, rules.sep] if second else [])]
    tokens, mask_positions = mask_tokens(labels, target, rules.masking, random)
    loss_mask = np.zeros(len(labels), dtype=np.bool_)  # [n]
    loss_mask[mask_positions] = True
    return PairSample(np.array(tokens, dtype=np.int64), np.array(labels, dtype=np.int64), loss_mask, len(first) + 2, swapped)


def truncate_pair(
    first: list[int], second: list[int], target: int, random: np.random.RandomState
) -> tuple[list[int], list[int]]:
    """Return both segments, cut to a number of tokens together.

    One token after the other is taken from the longer segment, at its front or its end by a coin.

    Args:
        first: ids of the first segment.
        second: ids of the second segment; may be empty.
        target: largest number of tokens of both together.
        random: throws the coins.
    """
    start, stop = 0, len(first)
    second_start, second_stop = 0, len(second)
    while (stop - start) + (second_stop - second_start) > target:
        front = random.random_sample() < 0.5
        if stop - start > second_stop - second_start:
            start, stop = (start + 1, stop) if front else (start, stop - 1)
        elif front:
            second_start += 1
        else:
            second_stop -= 1
    return first[start:stop], second[second_start:second_stop]
