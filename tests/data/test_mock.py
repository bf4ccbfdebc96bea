"""Made-up samples: theirs alone is the seed, all ids can occur, and what follows what can be learnt."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from megatron.config.schema import DataConfig, ModelSettings
from megatron.data.build import build_datasets
from megatron.data.errors import DataError
from megatron.data.loader import MicroBatchLoader
from megatron.data.mock import MAX_WORDS, bert_roles
from megatron.data.recipe import build_recipe
from megatron.data.tokenizer import ByteTokenizer, NullTokenizer

BERT = ModelSettings(architecture="bert")


def build_mock_datasets(model=None, count=50, seed=7, split="80,10,10", tokenizer=None, **data):
    """The three datasets and what makes batches of them."""
    tokenizer = tokenizer or NullTokenizer(1000)
    data = DataConfig(mock_data=True, seq_length=64, split=split, **data)
    recipe = build_recipe(model or ModelSettings(), data, seed, tokenizer)
    return build_datasets(data, seed, (count, count, count), tokenizer, recipe.make, recipe.mock), recipe.collate


def test_a_sample_follows_from_the_seed_the_split_and_its_number():
    """Not from how many there are, so that a longer run begins as a shorter one."""
    (training, validation, test), _ = build_mock_datasets()
    (longer, *_), _ = build_mock_datasets(count=5000)
    (other, *_), _ = build_mock_datasets(seed=8)
    assert len(training) == 50 and len(longer) == 5000
    kinds = [training[3].tokens, validation[3].tokens, test[3].tokens, other[3].tokens, training[4].tokens]
    assert np.array_equal(training[3].tokens, longer[3].tokens) and training[3].tokens.shape == (65,)
    assert all(not np.array_equal(a, b) for n, a in enumerate(kinds) for b in kinds[:n])
    assert training[0].tokens[:8].tolist() == [353, 637, 353, 637, 519, 102, 637, 353]  # for ever, or no run can be resumed
    with pytest.raises(IndexError):
        training[50]


def test_a_split_without_a_share_is_none():
    (training, validation, test), _ = build_mock_datasets(split="100,0,0")
    assert len(training) == 50 and validation is None and test is None


def test_ids_are_spread_over_the_vocabulary_and_documents_end():
    (training, validation, _), batches = build_mock_datasets(reset_position_ids=True, reset_attention_mask=True)
    tokens = np.concatenate([training[i].tokens for i in range(50)])
    words = set(tokens.tolist()) - {1000}
    assert len(words) == MAX_WORDS and min(words) < 50 and max(words) > 950
    assert 5 < np.count_nonzero(tokens == 1000) < 40
    held_out = np.concatenate([validation[i].tokens for i in range(50)])
    assert set(held_out.tolist()) <= words | {1000}
    assert batches(training, range(8), range(8)).documents.max() > 0
    assert training.locate(3, 5) == "made-up training sample 3, token 5"


def test_a_word_has_few_followers():
    """Five words follow each word, one of them every other time; in each split the same ones."""
    (training, validation, _), _ = build_mock_datasets(count=400)
    followers = [Counter(p for i in range(400) for p in pairwise(d[i].tokens.tolist())) for d in (training, validation)]
    per_word = [Counter(first for first, _ in c.elements()) for c in followers]
    for counts, totals in zip(followers, per_word, strict=True):
        likely = {pair for pair, count in counts.items() if pair[0] != 1000 and count > 0.02 * totals[pair[0]]}
        assert len(likely) < 6 * MAX_WORDS
        assert sum(counts[pair] for pair in likely) > 0.95 * sum(n for pair, n in counts.items() if pair[0] != 1000)
    top = [{a: max((n, b) for (x, b), n in c.items() if x == a)[1] for a in (p[0] for p in c) if a != 1000} for c in followers]
    assert top[0] == top[1]


def test_pairs_of_bert_are_masked_and_swapped_like_those_of_a_corpus():
    (training, *_), batches = build_mock_datasets(BERT, count=200, short_seq_prob=0.2)
    roles = bert_roles(NullTokenizer(1000))
    assert roles == {"eod": 1000, "cls": 999, "sep": 998, "mask": 997, "pad": 996}
    samples = [training[i] for i in range(200)]
    again = training[3]
    assert np.array_equal(samples[3].tokens, again.tokens) and samples[3].swapped == again.swapped
    assert 60 < sum(sample.swapped for sample in samples) < 140
    assert 20 < sum(len(sample.tokens) < 60 for sample in samples) < 80 and max(len(s.tokens) for s in samples) == 64
    for sample in samples:
        assert sample.labels[0] == 999 and sample.labels[-1] == 998 and sample.labels[sample.first_length - 1] == 998
        assert not set(roles.values()) & set(np.delete(sample.labels, [0, sample.first_length - 1, -1]).tolist())
        assert 0 < sample.first_length - 2 < len(sample.labels) - 3 or len(sample.labels) < 8
    seen = np.concatenate([s.tokens[s.loss_mask] for s in samples])
    assert 0.7 < np.mean(seen == 997) < 0.9
    batch = batches(training, range(4), range(4))
    assert batch.tokens.shape == (4, 64) and batch.swapped is not None


def test_bert_without_a_binary_head_has_one_segment():
    (training, *_), _ = build_mock_datasets(ModelSettings(architecture="bert", bert_binary_head=False))
    assert all(not training[i].swapped and training[i].first_length == len(training[i].tokens) for i in range(50))


def test_a_vocabulary_that_is_too_small():
    with pytest.raises(DataError, match="no id for sep: the tokenizer has only 2"):
        build_mock_datasets(BERT, tokenizer=NullTokenizer(1))
    (training, *_), _ = build_mock_datasets(tokenizer=NullTokenizer(1))
    assert set(training[0].tokens.tolist()) <= {0, 1}
    (training, *_), _ = build_mock_datasets(tokenizer=ByteTokenizer())
    assert max(training[0].tokens) <= 256


@pytest.mark.parametrize("model", [ModelSettings(), BERT], ids=["gpt", "bert"])
def test_two_ranks_share_the_samples_of_one(model):
    (training, *_), batches = build_mock_datasets(model, count=16)

    def dealt(ranks: int) -> list[list[int]]:
        loaders = [MicroBatchLoader(training, batches, rank, ranks, 2, 4, read_ahead=0) for rank in range(ranks)]
        parts = [batch for loader in loaders for batch in loader.next_batches(12)]
        rows = [(int(n), row.tolist()) for batch in parts for n, row in zip(batch.samples, batch.tokens, strict=True)]
        assert [number for number, _ in sorted(rows)] == list(range(4, 16))
        return [row for _, row in sorted(rows)]

    assert dealt(1) == dealt(2) == dealt(3)
