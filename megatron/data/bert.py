"""BERT samples: two segments of consecutive sentences, perhaps swapped, with some of their tokens masked.

    [CLS] first segment [SEP] second segment [SEP]

Sample i is determined by the data, the settings, the seed and i. Without the binary head a sample has one segment, and
nothing is swapped.
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
        first_length: number of tokens of the first segment, [CLS] and [SEP] included.
        swapped: whether the segments were swapped: the second one precedes the first in the document.
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
        max_length: maximum number of tokens of a sample, special ones included.
        short_seq_prob: fraction of samples with a random, shorter length.
        binary_head: make two segments, for the model's binary head, instead of one.
        cls: id of [CLS].
        sep: id of [SEP].
        masking: settings of masking.
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
    """Samples from a range of documents of an indexed dataset whose sequences are sentences, in training order.

    Args:
        indexed: the dataset on disk; its sequences are sentences.
        documents: numbers of the documents to read.
        rules: settings of the samples.
        num_samples: minimum number of samples; None for one epoch.
        split: name of the split, for messages.
        cache: stores the built index on disk; None builds it in memory.

    Raises:
        DataError: if no document has enough sentences; `__getitem__` raises it for an id outside the vocabulary.
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

        # The cache's path is a digest of these names and values, so renaming one would rebuild every index.
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
        self.rows: NDArray[np.int64] = arrays["rows"]  # [samples, 3]: first sentence, end, target length
        if not len(self.rows):
            raise DataError(
                f"{indexed.prefix}: the {split} split has {len(documents)} documents, none of which has {min_sentences} "
                "sentences of up to 512 tokens; preprocess the text with --split-sentences, or give the split a larger "
                "share with --split"
            )

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> PairSample:
        if not 0 <= number < len(self):
            raise IndexError(f"sample {number} of {len(self)}")
        begin, end, target_length = self.rows[number].tolist()
        # Each sample has its own generator, so that its masks depend neither on the reading order nor on the layout.
        random = np.random.RandomState((self.rules.seed + number) % 2**32)
        return pair_sample([self._sentence(i) for i in range(begin, end)], target_length, self.rules, random)

    def locate(self, number: int, position: int) -> str:
        """Return the place of a sample, for a message: file, document and sentences.

        The token position is not given: it is lost when a pair is swapped and truncated.
        """
        begin, end, _ = self.rows[number].tolist()
        document = self._document(begin)
        first = begin - int(self.indexed.documents[document])
        return f"{self.indexed.bin_path}, document {document}, sentences {first} to {first + end - begin - 1}"

    def _sentence(self, number: int) -> list[int]:
        """Return the ids of a sentence; raise a ForeignIdError if one is outside the vocabulary."""
        ids: list[int] = self.indexed[number].tolist()
        vocab_size = len(self.rules.masking.is_continuation)
        invalid = next((position for position, token in enumerate(ids) if not 0 <= token < vocab_size), None)
        if invalid is not None:
            document = self._document(number)
            sentence = number - int(self.indexed.documents[document])
            raise ForeignIdError(
                f"{self.indexed.bin_path}, document {document}, sentence {sentence}, token {invalid}: id {ids[invalid]} is "
                f"outside of the vocabulary of {vocab_size} ids; the data was made with another tokenizer"
            )
        return ids

    def _document(self, sentence: int) -> int:
        """Return the number of the document that contains a sentence."""
        return int(np.searchsorted(self.indexed.documents, sentence, side="right")) - 1


def pair_sample(
    sentences: Sequence[list[int]], target_length: int, rules: PairRules, random: np.random.RandomState
) -> PairSample:
    """Return the masked sample that is made of consecutive sentences.

    Args:
        sentences: token ids of each sentence; at least two if `rules.binary_head`.
        target_length: maximum number of tokens of both segments together, without special tokens.
        rules: settings of the sample.
        random: draws where the second segment begins, which segment comes first, and what is truncated and masked.
    """
    # The random numbers are drawn in Megatron-LM's order, so that the same data give the same samples.
    pivot, swapped = len(sentences), False
    if rules.binary_head:
        pivot = int(random.randint(1, len(sentences))) if len(sentences) > 2 else 1
        swapped = bool(random.random_sample() < 0.5)
    segments = [[token for sentence in part for token in sentence] for part in (sentences[:pivot], sentences[pivot:])]
    if swapped:
        segments.reverse()
    first, second = truncate_pair(segments[0], segments[1], target_length, random)
    labels = [rules.cls, *first, rules.sep, *([*second, rules.sep] if second else [])]
    tokens, mask_positions = mask_tokens(labels, target_length, rules.masking, random)
    loss_mask = np.zeros(len(labels), dtype=np.bool_)  # [n]
    loss_mask[mask_positions] = True
    return PairSample(np.array(tokens, dtype=np.int64), np.array(labels, dtype=np.int64), loss_mask, len(first) + 2, swapped)


def truncate_pair(
    first: list[int], second: list[int], max_tokens: int, random: np.random.RandomState
) -> tuple[list[int], list[int]]:
    """Return two segments, truncated so that they have at most `max_tokens` tokens together.

    Tokens are removed one at a time from the longer segment (the second, if both are equally long), from its front or its end
    at random.

    Args:
        first: ids of the first segment.
        second: ids of the second segment; may be empty.
        max_tokens: maximum number of tokens of both together.
        random: chooses between front and end.
    """
    start, stop = 0, len(first)
    second_start, second_stop = 0, len(second)
    while (stop - start) + (second_stop - second_start) > max_tokens:
        front = random.random_sample() < 0.5
        if stop - start > second_stop - second_start:
            start, stop = (start + 1, stop) if front else (start, stop - 1)
        elif front:
            second_start += 1
        else:
            second_stop -= 1
    return first[start:stop], second[second_start:second_stop]
