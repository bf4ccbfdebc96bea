"""The training, validation and test datasets of a run, from its settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from megatron.config.schema import DataConfig
from megatron.data.bert import BertDataset, PairRules
from megatron.data.blend import (
    SURPLUS,
    BlendedDataset,
    blend_order,
    count_draws,
    normalise_weights,
    parse_blend,
    samples_per_dataset,
)
from megatron.data.errors import DataError
from megatron.data.gpt import SPLITS, GPTDataset, SampleSource, parse_split, split_range
from megatron.data.index_cache import Arrays, IndexCache
from megatron.data.indexed import IndexedDataset, raise_open_file_limit
from megatron.data.masking import MaskingRules
from megatron.data.matching import check_tokenizer
from megatron.data.tokenizer import Tokenizer

MAX_DATASETS = 32766  # their numbers are int16


class MakeDataset(Protocol):
    """Makes the samples of one indexed dataset's share: at least `wanted`, or None for one epoch."""

    def __call__(
        self, indexed: IndexedDataset, share: tuple[float, float], wanted: int | None, split: str, cache: IndexCache
    ) -> SampleSource: ...


def gpt_dataset_maker(data: DataConfig, seed: int) -> MakeDataset:
    """GPT's: consecutive tokens, of a share of the sequences."""
    seq_length = data.seq_length

    def make(
        indexed: IndexedDataset, share: tuple[float, float], wanted: int | None, split: str, cache: IndexCache
    ) -> SampleSource:
        sequences = split_range(share, len(indexed))
        return GPTDataset(indexed, sequences, seq_length, seed, wanted, split=split, cache=cache)

    return make


def bert_dataset_maker(data: DataConfig, seed: int, tokenizer: Tokenizer, *, binary: bool) -> MakeDataset:
    """BERT's: pairs of segments, of a share of the documents. binary: whether they are for a binary head."""
    return pair_dataset_maker(build_pair_rules(data, seed, tokenizer, tokenizer.token, binary=binary))


def pair_dataset_maker(rules: PairRules) -> MakeDataset:
    """The same, by these rules."""

    def make(
        indexed: IndexedDataset, share: tuple[float, float], wanted: int | None, split: str, cache: IndexCache
    ) -> SampleSource:
        documents = split_range(share, indexed.document_count)
        return BertDataset(indexed, documents, rules, wanted, split=split, cache=cache)

    return make


def build_pair_rules(
    data: DataConfig, seed: int, tokenizer: Tokenizer, token: Callable[[str], int], *, binary: bool
) -> PairRules:
    """Return how BERT's samples are made.

    Args:
        data: their length and what share of them is short or masked.
        seed: of the run.
        tokenizer: knows which ids continue a word.
        token: role of a special token -> its id.
        binary: whether they are for a binary head.
    """
    continues = np.array([tokenizer.piece(i).startswith("##") for i in range(tokenizer.vocab_size)])
    cls, sep = token("cls"), token("sep")
    masking = MaskingRules(token("mask"), frozenset({cls, sep}), continues, data.mask_prob)
    return PairRules(data.seq_length, data.short_seq_prob, binary, cls, sep, masking, seed)


class DatasetBuilder:
    """Builds the datasets of one run. Opens each indexed dataset once, and checks it against the tokenizer."""

    def __init__(self, data: DataConfig, make: MakeDataset, tokenizer: Tokenizer | None) -> None:
        self.seq_length, self.make, self.tokenizer = data.seq_length, make, tokenizer
        self.cache = IndexCache(data.data_cache_path)
        self.opened: dict[str, IndexedDataset] = {}

    def open(self, prefix: str) -> IndexedDataset:
        """The indexed dataset at a prefix. DataError if its sidecar says that another tokenizer made it."""
        if prefix not in self.opened:
            dataset = IndexedDataset(prefix)
            if self.tokenizer is not None:
                check_tokenizer(dataset, self.tokenizer)
            self.opened[prefix] = dataset
        return self.opened[prefix]

    def one(self, prefix: str, share: tuple[float, float], wanted: int | None, split: str) -> SampleSource:
        """The samples of one dataset's share."""
        return self.make(self.open(prefix), share, wanted, split, self.cache)

    def blend(
        self, prefixes: Sequence[str], weights: Sequence[float] | None, share: tuple[float, float], wanted: int, split: str
    ) -> SampleSource:
        """The samples of several datasets: by weight, or without weights one epoch of each, in proportion to its size."""
        if len(prefixes) > MAX_DATASETS:
            raise DataError(f"{len(prefixes)} datasets in one blend; at most {MAX_DATASETS} are possible")
        raise_open_file_limit(len(self.opened) + len(prefixes) + 512)
        if weights is None:
            whole = [self.one(prefix, share, None, split) for prefix in prefixes]
            empty = [prefix for prefix, dataset in zip(prefixes, whole, strict=True) if not len(dataset)]
            if empty:
                raise DataError(f"{empty[0]}: the {split} split is shorter than one sample of {self.seq_length} tokens")
            have = sum(map(len, whole))
            if have < wanted:
                raise DataError(
                    f"{wanted} {split} samples wanted, but one epoch of these datasets has {have}; "
                    "give them weights (WEIGHT PREFIX WEIGHT PREFIX ...) to read them more than once"
                )
            return BlendedDataset(whole, *self.order(prefixes[0], [len(dataset) for dataset in whole], wanted))
        weights = normalise_weights(weights)
        order, numbers = self.order(prefixes[0], weights, sum(samples_per_dataset(weights, wanted)))
        drawn = count_draws(order, len(weights))
        surplus = SURPLUS
        while True:
            parts = [
                self.one(prefix, share, count, split)
                for prefix, count in zip(prefixes, samples_per_dataset(weights, wanted, surplus), strict=True)
            ]
            # Rounding can make the order draw more than was built. Then more is built: it must end, since a surplus of
            # 1 doubles every dataset.
            if all(len(part) >= count for part, count in zip(parts, drawn, strict=True)):
                return BlendedDataset(parts, order, numbers)
            surplus *= 2

    def order(self, prefix: str, weights: Sequence[float], size: int) -> tuple[NDArray[np.int16], NDArray[np.int64]]:
        """`blend_order` of the normalised weights, kept in the cache beside the first dataset."""

        def build() -> Arrays:
            order, numbers = blend_order(normalise_weights(weights), size)
            return dict(order=order, numbers=numbers)

        arrays = self.cache.get(prefix, dict(weights=list(weights), size=size), build)
        return arrays["order"], arrays["numbers"]


def build_datasets(
    data: DataConfig,
    seed: int,
    counts: tuple[int, int, int],
    tokenizer: Tokenizer | None = None,
    make: MakeDataset | None = None,
    mock: Callable[[int, str], SampleSource] | None = None,
) -> tuple[SampleSource | None, SampleSource | None, SampleSource | None]:
    """The (training, validation, test) datasets with at least `counts` samples each; None where none are wanted or given.

    The order of samples is Megatron-Core 0.16's for the same data, settings and counts. tokenizer: if given, checked
    against the datasets' sidecars. make: the samples of one dataset; GPT's unless given. mock: number of samples and split to
    made-up samples, in place of those of files.
    Raises DataError for missing or wrong files, and for a split that is too small.
    """
    if mock is not None:
        wanted_shares = zip(SPLITS, parse_split(data.split), counts, strict=True)
        made_up = [mock(count, split) if share is not None and count > 0 else None for split, share, count in wanted_shares]
        return made_up[0], made_up[1], made_up[2]
    separate = (data.train_data_path, data.valid_data_path, data.test_data_path)
    if data.data_path and any(separate):
        raise DataError("--data-path excludes --train-data-path, --valid-data-path and --test-data-path")
    if not data.data_path and not any(separate):
        raise DataError("no data: give --data-path PREFIX")
    builder = DatasetBuilder(data, make or gpt_dataset_maker(data, seed), tokenizer)
    built: list[SampleSource | None] = []
    shares = parse_split(data.split) if data.data_path else [(0.0, 1.0)] * 3
    for number, (split, share, wanted) in enumerate(zip(SPLITS, shares, counts, strict=True)):
        flag = "--data-path" if data.data_path else ("--train-data-path", "--valid-data-path", "--test-data-path")[number]
        words = data.data_path or separate[number]
        if share is None or not words or wanted <= 0:
            built.append(None)
            continue
        prefixes, weights = parse_blend(words, flag)
        # A single weighted prefix is still a blend under --data-path: it has the surplus, and so another order.
        alone = len(prefixes) == 1 and (weights is None or not data.data_path)
        built.append(
            builder.one(prefixes[0], share, wanted, split) if alone else builder.blend(prefixes, weights, share, wanted, split)
        )
    return built[0], built[1], built[2]
