"""BERT's samples: which sentences, which segments, which tokens are masked; equal to Megatron-Core 0.16.1's."""

from __future__ import annotations

import json
import runpy
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from bert_recipes import CLS, MASK, MAX_LENGTH, SEP, VOCAB, continuation_ids, digest, index_cases, pair_cases
from recipes import write_corpus

from megatron.config.schema import DataConfig, ModelConfig, ModelSettings, TokenizerConfig
from megatron.data import matching
from megatron.data.bert import BertDataset, PairRules, PairSample, truncate_pair
from megatron.data.build import build_datasets
from megatron.data.errors import DataError, ForeignIdError
from megatron.data.indexed import IndexedDataset
from megatron.data.loader import MicroBatchLoader
from megatron.data.masking import MaskingRules, mask_tokens
from megatron.data.recipe import build_recipe
from megatron.data.sentence_index import _mersenne_64, build_sentence_index
from megatron.data.tokenizer import ByteTokenizer, build_tokenizer

MASKING = MaskingRules(MASK, frozenset({CLS, SEP}), continuation_ids())
RULES = PairRules(MAX_LENGTH, 0.1, True, CLS, SEP, MASKING, seed=1234)


# The reference. Digests are over the outputs of megatron-core 0.16.1 for the recipes' inputs: `helpers_cpp.build_mapping`, and
# `BERTMaskedWordPieceDataset.__getitem__` with the functions it calls.


def test_a_map_of_the_reference() -> None:
    documents, lengths = np.array([0, 3, 4, 8]), np.array([5, 6, 7, 20, 3, 4, 5, 6], dtype=np.int32)
    rows = build_sentence_index(documents, lengths, max_tokens=12, short_prob=0.1, seed=1234, num_samples=6, min_sentences=2)
    assert rows.tolist() == [[4, 8, 12], [4, 8, 12], [0, 3, 12], [0, 3, 12], [0, 3, 12], [4, 8, 12]]


def test_maps_of_the_reference() -> None:
    found = [
        build_sentence_index(
            c.documents,
            c.lengths,
            max_tokens=c.longest,
            short_prob=c.short,
            seed=c.seed,
            num_samples=c.wanted,
            min_sentences=c.at_least,
        ).tolist()
        for c in index_cases()
    ]
    assert len(found) == 392 and sum(map(len, found)) == 36361
    assert digest(found) == "6aad867aaed70f22"


def sample_from_sentences(sentences: list[list[int]], target: int, rules: PairRules, number: int = 7) -> PairSample:
    """Sample `number` of a dataset in which it is made of these sentences."""
    dataset = BertDataset.__new__(BertDataset)
    held = type("Held", (), {"__getitem__": lambda self, i: np.array(sentences[i])})()
    dataset.rules, dataset.indexed = rules, held
    dataset.rows = np.array([[0, 0, 0]] * number + [[0, len(sentences), target]])
    return dataset[number]


def test_samples_of_the_reference() -> None:
    found = []
    for case in pair_cases():
        sample = sample_from_sentences(case.sentences, case.target, replace(RULES, seed=case.seed, binary_head=case.pairs))
        kinds = [0] * sample.first_length + [1] * (len(sample.tokens) - sample.first_length)
        labels = sample.labels[sample.loss_mask].tolist()
        found.append([sample.tokens.tolist(), list(map(int, sample.loss_mask)), labels, kinds, int(sample.swapped)])
    assert digest(found) == "11693573a72314f3"


def test_random_numbers_are_those_of_the_64_bit_twister() -> None:
    """The first numbers of the authors' list for seed 5489, and the ten thousandth, which the C++ standard names."""
    numbers = _mersenne_64(5489, 10000).tolist()
    assert numbers[:3] == [14514284786278117030, 4620546740167642908, 13109570281517897720]
    assert numbers[-1] == 9981545732273789042


# The index.


def test_every_sentence_once_in_an_epoch() -> None:
    """Samples of an epoch part each document's sentences among them, in any order of samples."""
    random = np.random.RandomState(3)
    starts = np.concatenate([[0], np.cumsum(random.randint(2, 9, 40))])
    lengths = random.randint(3, 30, starts[-1]).astype(np.int32)
    rows = build_sentence_index(starts, lengths, max_tokens=50, short_prob=0.1, seed=5, num_samples=None, min_sentences=2)
    assert sorted(i for begin, end, _ in rows.tolist() for i in range(begin, end)) == list(range(starts[-1]))
    assert all(np.searchsorted(starts, begin, "right") == np.searchsorted(starts, end - 1, "right") for begin, end, _ in rows)
    assert (rows[:, 1] - rows[:, 0]).min() == 2 and rows[:, 0].tolist() != sorted(rows[:, 0])
    longer = build_sentence_index(
        starts, lengths, max_tokens=50, short_prob=0.1, seed=5, num_samples=10 * len(rows), min_sentences=2
    )
    assert len(longer) >= 10 * len(rows) and set(longer[:, 0]) >= set(rows[:, 0])


def test_documents_that_are_passed_over() -> None:
    """One sentence is too few, and a sentence of more than 512 tokens spoils its document, unless it is all of it."""
    lengths = np.array([9, 9, 513, 9, 9, 512, 700], dtype=np.int32)
    documents = np.array([0, 1, 4, 6, 7])
    rows = build_sentence_index(documents, lengths, max_tokens=20, short_prob=0.0, seed=1, num_samples=None, min_sentences=2)
    assert {(begin, end) for begin, end, _ in rows.tolist()} == {(4, 6)}
    rows = build_sentence_index(documents, lengths, max_tokens=20, short_prob=0.0, seed=1, num_samples=None, min_sentences=1)
    assert {(begin, end) for begin, end, _ in rows.tolist()} == {(0, 1), (4, 6), (6, 7)}


def test_share_of_short_samples() -> None:
    starts, lengths = np.arange(0, 40001, 4), np.full(40000, 10, dtype=np.int32)
    for share, low, high in ((0.0, 0, 0), (0.1, 0.08, 0.12), (1.0, 0.95, 1.0)):
        targets = build_sentence_index(
            starts, lengths, max_tokens=100, short_prob=share, seed=1, num_samples=None, min_sentences=2
        )[:, 2]
        assert low <= (targets < 100).mean() <= high and targets.min() >= 2


# Masking.


def many_masked_samples(count: int = 3000) -> list[tuple[list[int], list[int], list[int]]]:
    """(tokens, what is seen, the places) of samples of 100 tokens."""
    random = np.random.RandomState(0)
    drawn = []
    for _ in range(count):
        tokens = [CLS, *random.randint(5, VOCAB, 60).tolist(), SEP, *random.randint(5, VOCAB, 37).tolist(), SEP]
        drawn.append((tokens, *mask_tokens(tokens, 100, MASKING, random)))
    return drawn


def test_masking_follows_the_published_shares() -> None:
    """15 % are to be guessed; of these 80 % are masked, 10 % any id, 10 % as they were."""
    kinds: Counter[str] = Counter()
    for tokens, seen, places in many_masked_samples():
        assert len(places) <= 15 and places == sorted(places)
        assert all(seen[i] == tokens[i] for i in range(100) if i not in places)
        kinds["all"] += len(places)
        for i in places:
            kinds["mask" if seen[i] == MASK else "same" if seen[i] == tokens[i] else "random"] += 1
    assert 0.145 < kinds["all"] / 300_000 <= 0.15
    assert [kinds[k] / kinds["all"] for k in ("mask", "random", "same")] == pytest.approx([0.8, 0.1, 0.1], abs=0.01)


def test_words_are_guessed_whole_and_special_tokens_never() -> None:
    apart, runs = {CLS, SEP}, Counter[int]()
    for tokens, _, places in many_masked_samples():
        guessed = set(places)
        assert not any(tokens[i] in apart for i in guessed)
        for i in range(1, 100):
            if MASKING.is_continuation[tokens[i]] and tokens[i - 1] not in apart:
                assert (i in guessed) == (i - 1 in guessed), "a word is cut"
        begun = [i for i in places if i - 1 not in guessed]
        runs.update(next(n for n in range(1, 101) if i + n not in guessed) for i in begun)
    assert runs[1] > runs[2] > runs[3] > 0


def test_a_share_of_choice_and_tiny_samples() -> None:
    random = np.random.RandomState(0)
    tokens = [CLS, *range(12, 12 + 4 * 50, 4), SEP]
    assert len(mask_tokens(tokens, 52, replace(MASKING, mask_prob=0.5), random)[1]) == 26
    assert mask_tokens([CLS, 12, SEP, 16, SEP], 2, MASKING, random)[1] == []
    assert len(mask_tokens([CLS, 12, SEP, 16, SEP], 100, MASKING, random)[1]) == 1


# Samples.


def test_a_sample_is_a_function_of_seed_and_number() -> None:
    sentences = [[12 + 4 * j for j in range(9)], [100 + 4 * j for j in range(9)], [200 + 4 * j for j in range(9)]]
    first = sample_from_sentences(sentences, 61, RULES)
    again, other, next_ = (
        sample_from_sentences(sentences, 61, r, n) for r, n in ((RULES, 7), (replace(RULES, seed=1), 7), (RULES, 8))
    )
    assert first.tokens.tolist() == again.tokens.tolist() and first.labels.tolist() == again.labels.tolist()
    assert first.tokens.tolist() != other.tokens.tolist() != next_.tokens.tolist()


def test_segments_and_their_order() -> None:
    """The second starts where the first ends, at any sentence; half of the pairs are swapped."""
    sentences = [[20 + i] * 3 for i in range(5)]
    whole = [t for s in sentences for t in s]
    cuts, swaps = Counter[int](), 0
    for number in range(2000):
        sample = sample_from_sentences(sentences, 61, RULES, number)
        labels = sample.labels.tolist()
        first, second = labels[1 : sample.first_length - 1], labels[sample.first_length : -1]
        assert labels[0] == CLS and labels[-1] == labels[sample.first_length - 1] == SEP
        assert (second + first if sample.swapped else first + second) == whole
        cuts[len(second if sample.swapped else first) // 3] += 1
        swaps += sample.swapped
    assert set(cuts) == {1, 2, 3, 4} and 0.45 < swaps / 2000 < 0.55


def test_without_binary_head_there_is_one_segment() -> None:
    sentences = [[20 + i] * 3 for i in range(5)]
    sample = sample_from_sentences(sentences, 61, replace(RULES, binary_head=False))
    assert sample.labels.tolist() == [CLS, *[t for s in sentences for t in s], SEP]
    assert not sample.swapped and sample.first_length == len(sample.tokens)


def test_pairs_that_are_too_long_are_cut() -> None:
    """The longer one, at its front or its end; what is left lies together."""
    random = np.random.RandomState(0)
    shapes = set()
    for _ in range(50):
        first, second = truncate_pair(list(range(40)), list(range(100, 130)), 50, random)
        assert len(first) == len(second) == 25 and np.all(np.diff(first) == 1) and np.all(np.diff(second) == 1)
        shapes.add((first[0], second[0]))
    assert len(shapes) > 20
    assert truncate_pair([1, 2], [3, 4], 4, random) == ([1, 2], [3, 4])
    assert len(sample_from_sentences([[20] * 90, [24] * 90], MAX_LENGTH - 3, RULES).tokens) == MAX_LENGTH


# Datasets on disk.


@pytest.fixture
def tokenizer(tmp_path: Path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"{'##' if i % 4 == 3 else ''}w{i}" for i in range(5, 90))]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    return build_tokenizer(TokenizerConfig(tokenizer_type="BertWordPieceLowerCase", vocab_file=str(tmp_path / "vocab.txt")))


def corpus(tmp_path: Path, name: str = "s", documents: int = 30, shift: int = 0) -> str:
    random = np.random.RandomState(2 + shift)
    drawn = [[random.randint(5, 90, random.randint(3, 12)) for _ in range(random.randint(2, 7))] for _ in range(documents)]
    return write_corpus(tmp_path / name, drawn)


BERT = ModelSettings(architecture="bert", vocab_size=92)


def build_bert_dataset(tokenizer, *words: str, wanted=(200, 0, 0), model: ModelConfig = BERT, seed: int = 1, split: str = "1"):
    """(training samples, how they become batches)."""
    data = DataConfig(data_path=words, split=split, seq_length=32)
    recipe = build_recipe(model, data, seed, tokenizer)
    return build_datasets(data, seed, wanted, tokenizer, recipe.make)[0], recipe.collate


@pytest.mark.parametrize("binary", [True, False])
def test_a_micro_batch_holds_the_samples_padded_and_masked(tmp_path: Path, tokenizer, binary: bool) -> None:
    dataset, make = build_bert_dataset(tokenizer, corpus(tmp_path), model=replace(BERT, bert_binary_head=binary))
    batch = make(dataset, range(20), range(100, 120))
    assert batch.samples.tolist() == list(range(100, 120)) and batch.tokens.shape == (20, 32)
    assert (batch.segments is not None) == (batch.swapped is not None) == binary
    assert torch.equal(batch.positions, torch.arange(32).expand(20, 32))
    for row in range(20):
        sample = dataset[row]
        n = len(sample.tokens)
        assert batch.tokens[row].tolist() == sample.tokens.tolist() + [0] * (32 - n)
        assert batch.documents[row].tolist() == [0] * n + [1] * (32 - n)
        assert batch.loss_mask[row].tolist() == sample.loss_mask.astype(float).tolist() + [0.0] * (32 - n)
        assert batch.labels[row].tolist() == [int(t) for t in sample.labels * sample.loss_mask] + [0] * (32 - n)
        if binary:
            assert batch.segments[row].tolist() == [0] * sample.first_length + [1] * (n - sample.first_length) + [0] * (32 - n)
            assert batch.swapped[row] == sample.swapped
    assert dataset.rules.binary_head == binary


def test_a_full_batch_has_no_padding(tmp_path: Path, tokenizer) -> None:
    dataset, make = build_bert_dataset(tokenizer, write_corpus(tmp_path / "full", [[np.full(40, 9), np.full(40, 9)]] * 20))
    full = [i for i in range(100) if len(dataset[i].tokens) == 32][:4]
    assert make(dataset, full, full).documents is None


@pytest.mark.parametrize("read_ahead", [0, 3])
def test_a_loader_resumes_in_the_middle(tmp_path: Path, tokenizer, read_ahead: int) -> None:
    prefix = corpus(tmp_path)

    def run(consumed: int) -> list:
        dataset, make = build_bert_dataset(tokenizer, prefix)
        loader = MicroBatchLoader(dataset, make, 1, 2, 2, consumed, read_ahead=read_ahead)
        try:
            steps = [loader.next_batches(8) for _ in range(10 - consumed // 8)]
        finally:
            loader.close()
        return [[b.tokens.tolist(), b.labels.tolist(), b.swapped.tolist(), b.samples.tolist()] for s in steps for b in s]

    whole = run(0)
    assert len(whole) == 20 and run(48) == whole[12:]
    assert whole[0][3] == [2, 3] and whole[1][3] == [6, 7]


def test_blends_and_splits(tmp_path: Path, tokenizer) -> None:
    first, second = corpus(tmp_path, "a"), corpus(tmp_path, "b", shift=1)
    blend, _ = build_bert_dataset(tokenizer, "3", first, "1", second)
    alone_first, _ = build_bert_dataset(tokenizer, first, wanted=(151, 0, 0))
    same = [i for i in range(200) if blend.locate(i, 0).startswith(f"{first}.bin")]
    assert len(same) == 150 and len(blend) >= 200
    assert [blend[i].tokens.tolist() for i in same] == [alone_first[i].tokens.tolist() for i in range(150)]
    data = DataConfig(data_path=(first,), split="50,50", seq_length=32)
    recipe = build_recipe(BERT, data, 1, tokenizer)
    training, validation, _ = build_datasets(data, 1, (60, 60, 0), tokenizer, recipe.make)
    documents = [{int(d.locate(i, 0).split("document ")[1].split(",")[0]) for i in range(60)} for d in (training, validation)]
    assert documents[0] <= set(range(15)) and documents[1] <= set(range(15, 30)) and all(documents)


def test_the_cache_tells_settings_apart(tmp_path: Path, tokenizer) -> None:
    prefix = corpus(tmp_path)

    def rows(**changes) -> list:
        return build_bert_dataset(tokenizer, prefix, **changes)[0].rows.tolist()

    before = rows()
    assert rows() == before and len(list((tmp_path / "cache").glob("*/*/about.json"))) == 1
    assert rows(seed=2) != before and rows(model=replace(BERT, bert_binary_head=False)) != before


def test_an_id_beyond_the_vocabulary_is_named(tmp_path: Path, tokenizer, monkeypatch) -> None:
    """The vocabulary has 92 ids: those of vocab.txt, [BOS] and [EOS]. Where opening did not look, training does."""
    documents = [[np.arange(5, 12), np.arange(20, 26)] for _ in range(4)]
    documents[2][1][3] = 92
    prefix = write_corpus(tmp_path / "bad", documents)
    message = rf"{tmp_path}/bad.bin, document 2, sentence 1, token 3: id 92 is outside of the vocabulary of 92 ids"
    with pytest.raises(DataError, match=message):
        build_bert_dataset(tokenizer, prefix)
    monkeypatch.setattr(matching, "_piece_starts", lambda tokens: iter(()))
    dataset, make = build_bert_dataset(tokenizer, prefix)
    with pytest.raises(ForeignIdError, match=message):
        make(dataset, range(40), range(40))


def test_splits_without_samples_are_refused(tmp_path: Path, tokenizer) -> None:
    lonely = write_corpus(tmp_path / "lonely", [[np.arange(5, 12)]] * 9)
    with pytest.raises(DataError, match=r"lonely: the training split has 9 documents, none of which has 2 sentences of up to"):
        build_bert_dataset(tokenizer, lonely)
    assert len(build_bert_dataset(tokenizer, lonely, model=replace(BERT, bert_binary_head=False))[0]) >= 200
    with pytest.raises(DataError, match=r"the validation split has 0 documents.*--split"):
        build_bert_dataset(tokenizer, corpus(tmp_path), wanted=(10, 10, 0), split="1000000,1,0")
    with pytest.raises(DataError, match="ByteTokenizer has no cls token"):
        build_recipe(BERT, DataConfig(seq_length=32), 1, ByteTokenizer())
    with pytest.raises(ValueError, match="samples of 1 tokens"):
        build_sentence_index(
            np.array([0, 2]),
            np.array([1, 1], dtype=np.int32),
            max_tokens=1,
            short_prob=0.1,
            seed=1,
            num_samples=None,
            min_sentences=2,
        )


def test_the_place_of_a_sample_is_named(tmp_path: Path, tokenizer) -> None:
    prefix = corpus(tmp_path)
    dataset, _ = build_bert_dataset(tokenizer, prefix)
    held = IndexedDataset(prefix)
    for number in range(30):
        begin, end, _ = dataset.rows[number].tolist()
        document = int(np.searchsorted(held.documents, begin, "right")) - 1
        start = int(held.documents[document])
        said = f"{prefix}.bin, document {document}, sentences {begin - start} to {end - 1 - start}"
        assert dataset.locate(number, 0) == said
    with pytest.raises(IndexError):
        dataset[len(dataset)]


@pytest.mark.parametrize("binary", [True, False])
def test_the_inspector_shows_what_training_reads(tmp_path: Path, tokenizer, capsys, binary: bool) -> None:
    prefix, words = (
        corpus(tmp_path),
        ["--tokenizer-type", "BertWordPieceLowerCase", "--vocab-file", str(tmp_path / "vocab.txt")],
    )
    flags = ["--model", "bert", "--samples", "20", "--split", "1", "--seed", "1", *words]
    flags += [] if binary else ["--bert-no-binary-head"]
    tool = runpy.run_path(str(Path(__file__).parents[2] / "tools" / "inspect_dataset.py"))
    assert tool["main"]([prefix, *flags, "--seq-length", "32", "--json"]) == 0
    model = replace(BERT, bert_binary_head=binary)
    training, _ = build_bert_dataset(tokenizer, prefix, wanted=(20, 0, 0), model=model)
    for shown, sample in zip(json.loads(capsys.readouterr().out)["samples"], map(training.__getitem__, range(20)), strict=True):
        assert shown["tokens"] == sample.tokens.tolist() and shown["first"] == sample.first_length
        assert shown["swapped"] == sample.swapped and list(map(int, shown["guess"])) == sample.loss_mask.nonzero()[0].tolist()
        assert list(shown["guess"].values()) == sample.labels[sample.loss_mask].tolist()
        assert shown["text"].split()[0] == "[CLS]" and shown["text"].count("=") >= len(shown["guess"]) > 0
    assert tool["main"]([prefix, *flags, "--seq-length", "32"]) == 0
    assert "sample 19, " in capsys.readouterr().out
    with pytest.raises(tool["DataError"], match=r"`--mask-prob 2.0` must be greater than 0 and less than 1"):
        tool["main"]([prefix, *flags, "--seq-length", "32", "--mask-prob", "2"])
    with pytest.raises(tool["DataError"], match=r"--seq-length 4 is too short"):
        tool["main"]([prefix, *flags, "--seq-length", "4"])
    with pytest.raises(tool["DataError"], match=r"--model bert needs a tokenizer"):
        tool["main"]([prefix, *flags[:6], "--seq-length", "16"])
