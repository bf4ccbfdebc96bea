"""Build the training, validation and test datasets of a run from its settings."""

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

MAX_DATASETS = 32766  # a dataset's number in a blend is an int16


class MakeDataset(Protocol):
    """Makes the samples of one split of an indexed dataset."""

    def __call__(
        self, indexed: IndexedDataset, share: tuple[float, float], num_samples: int | None, split: str, cache: IndexCache
    ) -> SampleSource:
        """Make the samples.

        Args:
            indexed: the dataset on disk.
            share: begin and end of the split as fractions of the dataset, from 0 to 1.
            num_samples: minimum number of samples; None for one epoch.
            split: name of the split, for messages.
            cache: stores the built index on disk.
        """
        ...


def gpt_dataset_maker(data: DataConfig, seed: int) -> MakeDataset:
    """Return the function that makes GPT samples: consecutive tokens from the sequences of one split."""
    seq_length = data.seq_length

    def make(
        indexed: IndexedDataset, share: tuple[float, float], num_samples: int | None, split: str, cache: IndexCache
    ) -> SampleSource:
        sequences = split_range(share, len(indexed))
        return GPTDataset(indexed, sequences, seq_length, seed, num_samples, split=split, cache=cache)

    return make


def bert_dataset_maker(data: DataConfig, seed: int, tokenizer: Tokenizer, *, binary: bool) -> MakeDataset:
    """Return the function that makes BERT samples: pairs of segments from the documents of one split.

    Args:
        data: the sample length, and the probabilities of short samples and of masking.
        seed: seed of the run.
        tokenizer: the tokenizer, with BERT's special tokens.
        binary: whether the samples are for a binary head.
    """
    return pair_dataset_maker(build_pair_rules(data, seed, tokenizer, tokenizer.token, binary=binary))


def pair_dataset_maker(rules: PairRules) -> MakeDataset:
    """Return the function that makes BERT samples with these settings."""

    def make(
        indexed: IndexedDataset, share: tuple[float, float], num_samples: int | None, split: str, cache: IndexCache
    ) -> SampleSource:
        documents = split_range(share, indexed.document_count)
        return BertDataset(indexed, documents, rules, num_samples, split=split, cache=cache)

    return make


def build_pair_rules(
    data: DataConfig, seed: int, tokenizer: Tokenizer, token: Callable[[str], int], *, binary: bool
) -> PairRules:
    """Return the settings of BERT samples.

    Args:
        data: the sample length, and the probabilities of short samples and of masking.
        seed: seed of the run.
        tokenizer: its pieces tell which ids continue a word.
        token: maps the role of a special token to its id.
        binary: whether the samples are for a binary head.
    """
    is_continuation = np.array([tokenizer.piece(i).startswith("##") for i in range(tokenizer.vocab_size)])  # [vocab]
    cls, sep = token("cls"), token("sep")
    masking = MaskingRules(token("mask"), frozenset({cls, sep}), is_continuation, data.mask_prob)
    return PairRules(data.seq_length, data.short_seq_prob, binary, cls, sep, masking, seed)


class DatasetBuilder:
    """Builds the datasets of one run. Opens each indexed dataset once, and checks it against the tokenizer."""

    def __init__(self, data: DataConfig, make: MakeDataset, tokenizer: Tokenizer | None) -> None:
        self.seq_length, self.make, self.tokenizer = data.seq_length, make, tokenizer
        self.cache = IndexCache(data.data_cache_path)
        self.opened: dict[str, IndexedDataset] = {}

    def open(self, prefix: str) -> IndexedDataset:
        """Return the indexed dataset at a prefix, opened once; raise a DataError if it was made with another tokenizer."""
        if prefix not in self.opened:
            dataset = IndexedDataset(prefix)
            if self.tokenizer is not None:
                check_tokenizer(dataset, self.tokenizer)
            self.opened[prefix] = dataset
        return self.opened[prefix]

    def build_one(self, prefix: str, share: tuple[float, float], num_samples: int | None, split: str) -> SampleSource:
        """Build the samples of one split of a dataset.

        Args:
            prefix: path of the dataset without `.bin` or `.idx`.
            share: begin and end of the split as fractions of the dataset, from 0 to 1.
            num_samples: minimum number of samples; None for one epoch.
            split: name of the split, for messages.
        """
        return self.make(self.open(prefix), share, num_samples, split, self.cache)

    def build_blend(
        self, prefixes: Sequence[str], weights: Sequence[float] | None, share: tuple[float, float], num_samples: int, split: str
    ) -> SampleSource:
        """Build the samples of one split of several datasets.

        Args:
            prefixes: paths of the datasets without `.bin` or `.idx`.
            weights: one for each dataset, of any sum; None reads one epoch of each, in proportion to its size.
            share: begin and end of the split as fractions of the dataset, from 0 to 1.
            num_samples: minimum number of samples.
            split: name of the split, for messages.

        Raises:
            DataError: if there are too many datasets or, without weights, if one is empty or an epoch has too few samples.
        """
        if len(prefixes) > MAX_DATASETS:
            raise DataError(f"{len(prefixes)} datasets in one blend; at most {MAX_DATASETS} are possible")
        raise_open_file_limit(len(self.opened) + len(prefixes) + 512)
        if weights is None:
            datasets = [self.build_one(prefix, share, None, split) for prefix in prefixes]
            empty = [prefix for prefix, dataset in zip(prefixes, datasets, strict=True) if not len(dataset)]
            if empty:
                raise DataError(f"{empty[0]}: the {split} split is shorter than one sample of {self.seq_length} tokens")
            available = sum(map(len, datasets))
            if available < num_samples:
                raise DataError(
                    f"{num_samples} {split} samples needed, but one epoch of these datasets has {available}; "
                    "give them weights (WEIGHT PREFIX WEIGHT PREFIX ...) to read them more than once"
                )
            return BlendedDataset(datasets, *self.cached_order(prefixes[0], list(map(len, datasets)), num_samples))
        weights = normalise_weights(weights)
        order, numbers = self.cached_order(prefixes[0], weights, sum(samples_per_dataset(weights, num_samples)))
        drawn = count_draws(order, len(weights))
        surplus = SURPLUS
        while True:
            datasets = [
                self.build_one(prefix, share, count, split)
                for prefix, count in zip(prefixes, samples_per_dataset(weights, num_samples, surplus), strict=True)
            ]
            # Because of rounding, the order can draw more samples than were built; then more are built. The loop ends because
            # the surplus doubles each time.
            if all(len(dataset) >= count for dataset, count in zip(datasets, drawn, strict=True)):
                return BlendedDataset(datasets, order, numbers)
            surplus *= 2

    def cached_order(self, prefix: str, weights: Sequence[float], size: int) -> tuple[NDArray[np.int16], NDArray[np.int64]]:
        """Return the `blend_order` of these weights, from the cache or built and stored there.

        Args:
            prefix: the dataset in whose cache directory it is stored.
            weights: one for each dataset, of any sum.
            size: number of samples.
        """

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
    """Build the training, validation and test datasets of a run.

    The order of samples is Megatron-Core 0.16's for the same data, settings and counts.

    Args:
        data: the data settings, with the files and the split.
        seed: seed of the sample order.
        counts: minimum numbers of training, validation and test samples.
        tokenizer: checked against the datasets' sidecars, if given.
        make: creates the samples of one dataset; GPT samples by default.
        mock: creates synthetic samples, given their number and the split's name, instead of reading files.

    Returns:
        The three datasets; None for a split without data or with a count of 0.

    Raises:
        DataError: for missing or wrong files, and for a split that is too small.
    """
    if mock is not None:
        splits = zip(SPLITS, parse_split(data.split), counts, strict=True)
        synthetic = [mock(count, split) if share is not None and count > 0 else None for split, share, count in splits]
        return synthetic[0], synthetic[1], synthetic[2]
    separate = (data.train_data_path, data.valid_data_path, data.test_data_path)
    if data.data_path and any(separate):
        raise DataError("--data-path excludes --train-data-path, --valid-data-path and --test-data-path")
    if not data.data_path and not any(separate):
        raise DataError("no data: give --data-path PREFIX")
    builder = DatasetBuilder(data, make or gpt_dataset_maker(data, seed), tokenizer)
    built: list[SampleSource | None] = []
    shares = parse_split(data.split) if data.data_path else [(0.0, 1.0)] * 3
    for number, (split, share, num_samples) in enumerate(zip(SPLITS, shares, counts, strict=True)):
        flag = "--data-path" if data.data_path else ("--train-data-path", "--valid-data-path", "--test-data-path")[number]
        arguments = data.data_path or separate[number]
        if share is None or not arguments or num_samples <= 0:
            built.append(None)
            continue
        prefixes, weights = parse_blend(arguments, flag)
        # With --data-path, a single prefix with a weight is a blend, and its surplus changes the order, as in Megatron-Core.
        is_single = len(prefixes) == 1 and (weights is None or not data.data_path)
        built.append(
            builder.build_one(prefixes[0], share, num_samples, split)
            if is_single
            else builder.build_blend(prefixes, weights, share, num_samples, split)
        )
    return built[0], built[1], built[2]
