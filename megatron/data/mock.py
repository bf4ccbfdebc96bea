"""Generate synthetic data for --mock-data: any amount of text that a model can learn, determined by the seed.

Some ids of the vocabulary, called words, are arranged in a circle in random order. Each word is followed by one that is a few
steps away on the circle, with the probabilities below. A GPT that has learnt them completely has a loss of 1.3. Sample i of a
split is determined by the seed, the split and i; all splits share the circle.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping

import numpy as np
from numpy.typing import NDArray

from megatron.data.bert import SPECIAL_TOKENS, PairRules, PairSample, pair_sample
from megatron.data.errors import DataError
from megatron.data.gpt import SPLITS, Sample, SampleSource
from megatron.data.tokenizer_base import Tokenizer

MOCK_DATA_NOTE = "the data are synthetic, as --mock-data asks, so the losses say nothing about a corpus"
MAX_WORDS = 128  # words on the circle; few enough for each of them to occur often in a short run
STEPS = np.array([1, -1, 2, -2, 3])  # steps along the circle from a word to the next one
SHARES = np.array([0.5, 0.25, 0.125, 0.0625, 0.0625])  # probabilities of these steps
MEAN_DOCUMENT = 200  # mean length of a document in tokens
MIN_SENTENCE, MAX_SENTENCE = 4, 24  # length of a sentence in tokens
SEEDS = 2**32  # number of seeds that numpy's generators accept

MakeMock = Callable[[int, str], SampleSource]  # given the number of samples and the split, returns synthetic samples


class MockText:
    """A circle of words, and the probabilities with which one follows another.

    Args:
        vocab_size: number of ids; the words are spread over all of them, and so over all tensor-parallel ranks.
        special: ids that must not be words.
        seed: seed of the run.
    """

    def __init__(self, vocab_size: int, special: Collection[int], seed: int) -> None:
        ids = np.setdiff1d(np.arange(vocab_size), np.array(sorted(special), dtype=np.int64))
        if not len(ids):
            raise DataError(f"--mock-data has no ids for words: all {vocab_size} ids of the tokenizer are special tokens")
        chosen = np.linspace(0, len(ids) - 1, min(MAX_WORDS, len(ids))).astype(np.int64)
        self.seed = seed % SEEDS
        self.words: NDArray[np.int64] = np.random.RandomState(self.seed).permutation(ids[chosen])

    def random(self, split: str, number: int) -> np.random.RandomState:
        """Return the random generator of one sample; RandomState gives the same numbers in every version of numpy."""
        return np.random.RandomState([self.seed, SPLITS.index(split), number % SEEDS])

    def generate(self, random: np.random.RandomState, starts: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Return words, int64 `[n]`. starts: bool `[n]`, true at each first word of a text, which is drawn at random."""
        steps = random.choice(STEPS, size=len(starts), p=SHARES)  # [n]
        steps[starts] = random.randint(0, len(self.words), size=np.count_nonzero(starts))  # a jump to any word
        words: NDArray[np.int64] = self.words[np.cumsum(steps) % len(self.words)]
        return words


class MockGPT:
    """Synthetic GPT samples: consecutive documents, each followed by the end-of-document token, if there is one."""

    def __init__(self, text: MockText, eod: int | None, seq_length: int, count: int, split: str) -> None:
        self.text, self.eod, self.seq_length, self.count, self.split = text, eod, seq_length, count, split

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> Sample:
        if not 0 <= number < self.count:
            raise IndexError(f"sample {number} of {self.count}")
        random = self.text.random(self.split, number)
        ends = random.random_sample(self.seq_length + 1) < 1.0 / MEAN_DOCUMENT
        # A new document begins after each end, and at the sample's own beginning.
        tokens = self.text.generate(random, np.concatenate([[True], ends[:-1]]))
        if self.eod is not None:
            tokens[ends] = self.eod
        return Sample(tokens)

    def locate(self, number: int, position: int) -> str:
        """Return the name of a sample and `position`, for a message."""
        return f"made-up {self.split} sample {number}, token {position}"


class MockBert:
    """Synthetic BERT samples: sentences, from which masked pairs are made as from those of a corpus."""

    def __init__(self, text: MockText, rules: PairRules, count: int, split: str) -> None:
        self.text, self.rules, self.count, self.split = text, rules, count, split

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> PairSample:
        if not 0 <= number < self.count:
            raise IndexError(f"sample {number} of {self.count}")
        random, max_tokens = self.text.random(self.split, number), self.rules.max_length - SPECIAL_TOKENS
        is_short = random.random_sample() < self.rules.short_seq_prob
        target_length = int(random.randint(2, max_tokens + 1)) if is_short else max_tokens
        borders = [0]  # starts and end of the sentences, in tokens
        while borders[-1] < target_length or len(borders) < 3:  # at least two sentences, for two segments
            borders.append(borders[-1] + int(random.randint(MIN_SENTENCE, MAX_SENTENCE + 1)))
        words: list[int] = self.text.generate(random, np.arange(borders[-1]) == 0).tolist()
        sentences = [words[begin:end] for begin, end in itertools.pairwise(borders)]
        return pair_sample(sentences, target_length, self.rules, random)

    def locate(self, number: int, position: int) -> str:
        """Return the name of a sample, for a message; the position is not known in a swapped and truncated pair."""
        return f"made-up {self.split} sample {number}"


def mock_gpt(tokenizer: Tokenizer, seq_length: int, seed: int) -> MakeMock:
    """Return the function that generates GPT samples.

    Args:
        tokenizer: its ids, without special ones, become the words.
        seq_length: input tokens of a sample.
        seed: seed of the run.
    """
    text = MockText(tokenizer.vocab_size, tokenizer.special.values(), seed)
    return lambda count, split: MockGPT(text, tokenizer.special.get("eod"), seq_length, count, split)


def mock_bert(tokenizer: Tokenizer, rules: PairRules) -> MakeMock:
    """Return the function that generates BERT samples with these settings."""
    text = MockText(tokenizer.vocab_size, bert_roles(tokenizer).values(), rules.seed)
    return lambda count, split: MockBert(text, rules, count, split)


def bert_roles(tokenizer: Tokenizer) -> Mapping[str, int]:
    """Return ids for BERT's special tokens: the tokenizer's own, and the vocabulary's last free ids for those that it lacks.

    Synthetic text does not use these ids otherwise, so even NullTokenizer, which needs no file, can be used. DataError if the
    vocabulary is too small.
    """
    roles = dict(tokenizer.special)
    free = (i for i in reversed(range(tokenizer.vocab_size)) if i not in tokenizer.special.values())
    for role in ("cls", "sep", "mask", "pad"):
        if role not in roles:
            if (number := next(free, None)) is None:
                raise DataError(f"--mock-data has no id for {role}: the tokenizer has only {tokenizer.vocab_size}")
            roles[role] = number
    return roles
