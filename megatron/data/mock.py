"""Generate synthetic data for --mock-data: text of any amount that a model can learn, from the seed alone.

Some ids of the vocabulary, the words, are arranged in a circle in random order. Each word is followed by one a few places
further along the circle, more often by a near one than by a far one. A GPT that has learnt this completely has a loss of 1.3.
Sample i of a split follows from the seed, the split and i; all splits share the circle.
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

MADE_UP = "the data are made up, as --mock-data asks: the losses say nothing of a corpus"
MAX_WORDS = 128  # words in the circle: few enough that a short run sees each of them often
STEPS = np.array([1, -1, 2, -2, 3])  # steps along the circle from a word to the next one
SHARES = np.array([0.5, 0.25, 0.125, 0.0625, 0.0625])  # probabilities of these steps
MEAN_DOCUMENT = 200  # tokens
MIN_SENTENCE, MAX_SENTENCE = 4, 24  # tokens
SEEDS = 2**32  # number of seeds that numpy's generators accept

MakeMock = Callable[[int, str], SampleSource]  # given the number of samples and the split, returns synthetic samples


class MockText:
    """A circle of words, and the probabilities with which one follows another.

    Args:
        vocab_size: ids of the tokenizer; the words are spread over all of them, and so over all tensor-parallel ranks.
        special: ids that must not be words.
        seed: seed of the run.
    """

    def __init__(self, vocab_size: int, special: Collection[int], seed: int) -> None:
        ids = np.setdiff1d(np.arange(vocab_size), np.array(sorted(special), dtype=np.int64))
        if not len(ids):
            raise DataError(f"--mock-data finds no words: all {vocab_size} ids of the tokenizer are special tokens")
        spread = np.linspace(0, len(ids) - 1, min(MAX_WORDS, len(ids))).astype(np.int64)
        self.seed = seed % SEEDS
        self.words: NDArray[np.int64] = np.random.RandomState(self.seed).permutation(ids[spread])

    def random(self, split: str, number: int) -> np.random.RandomState:
        """Return the generator of one sample. Its numbers are the same in every version of numpy."""
        return np.random.RandomState([self.seed, SPLITS.index(split), number % SEEDS])

    def write(self, random: np.random.RandomState, fresh: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Return words, int64 `[n]`. fresh: bool `[n]`, true at the first word of a text, which does not depend on the last."""
        steps = random.choice(STEPS, size=len(fresh), p=SHARES)  # [n]
        steps[fresh] = random.randint(0, len(self.words), size=np.count_nonzero(fresh))  # to any word of the circle
        words: NDArray[np.int64] = self.words[np.cumsum(steps) % len(self.words)]
        return words


class MockGPT:
    """Synthetic GPT samples: documents one after the other, each followed by the end-of-document token, if there is one."""

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
        tokens = self.text.write(random, np.concatenate([[True], ends[:-1]]))
        if self.eod is not None:
            tokens[ends] = self.eod
        return Sample(tokens)

    def locate(self, number: int, position: int) -> str:
        """Return where token `position` of a sample lies, for a message."""
        return f"made-up {self.split} sample {number}, token {position}"


class MockBert:
    """Synthetic BERT samples: sequences of sentences, made into masked pairs like those of a corpus."""

    def __init__(self, text: MockText, rules: PairRules, count: int, split: str) -> None:
        self.text, self.rules, self.count, self.split = text, rules, count, split

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> PairSample:
        if not 0 <= number < self.count:
            raise IndexError(f"sample {number} of {self.count}")
        random, max_tokens = self.text.random(self.split, number), self.rules.max_length - SPECIAL_TOKENS
        is_short = random.random_sample() < self.rules.short_seq_prob
        target = int(random.randint(2, max_tokens + 1)) if is_short else max_tokens
        borders = [0]  # of sentences
        while borders[-1] < target or len(borders) < 3:  # at least two sentences, for two segments
            borders.append(borders[-1] + int(random.randint(MIN_SENTENCE, MAX_SENTENCE + 1)))
        words: list[int] = self.text.write(random, np.arange(borders[-1]) == 0).tolist()
        sentences = [words[begin:end] for begin, end in itertools.pairwise(borders)]
        return pair_sample(sentences, target, self.rules, random)

    def locate(self, number: int, position: int) -> str:
        """Return the name of a sample, for a message; the position is not known in a swapped and truncated pair."""
        return f"made-up {self.split} sample {number}"


def mock_gpt(tokenizer: Tokenizer, seq_length: int, seed: int) -> MakeMock:
    """Return the function that generates GPT's samples.

    Args:
        tokenizer: its ids are the words.
        seq_length: input tokens of a sample.
        seed: seed of the run.
    """
    text = MockText(tokenizer.vocab_size, tokenizer.special.values(), seed)
    return lambda count, split: MockGPT(text, tokenizer.special.get("eod"), seq_length, count, split)


def mock_bert(tokenizer: Tokenizer, rules: PairRules) -> MakeMock:
    """Return the function that generates BERT's samples, by these rules."""
    text = MockText(tokenizer.vocab_size, bert_roles(tokenizer).values(), rules.seed)
    return lambda count, split: MockBert(text, rules, count, split)


def bert_roles(tokenizer: Tokenizer) -> Mapping[str, int]:
    """Return ids for BERT's special tokens: the tokenizer's, and for tokens that it lacks the last ids of its vocabulary.

    Synthetic text uses these ids for nothing else, so NullTokenizer, which needs no file, is sufficient. DataError if the
    vocabulary is too small.
    """
    roles = dict(tokenizer.special)
    free = (i for i in reversed(range(tokenizer.vocab_size)) if i not in tokenizer.special.values())
    for role in ("cls", "sep", "mask", "pad"):
        if role not in roles:
            if (number := next(free, None)) is None:
                raise DataError(f"--mock-data finds no id for {role}: the tokenizer has only {tokenizer.vocab_size}")
            roles[role] = number
    return roles
