"""Blend several datasets by weight, in Megatron-Core 0.16's order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron.config.data import parse_number
from megatron.data.errors import DataError
from megatron.data.gpt import SampleSource

SURPLUS = 0.005  # fraction of samples that each dataset is built with in addition to its share


def parse_blend(arguments: Sequence[str], flag: str = "--data-path") -> tuple[list[str], list[float] | None]:
    """Return prefixes and weights of `PREFIX ...` or `WEIGHT PREFIX WEIGHT PREFIX ...`; weights are None for the first form."""
    arguments = [argument.strip() for argument in arguments]
    weights = [parse_number(argument) for argument in arguments[::2]]
    numeric = [weight for weight in weights if weight is not None]
    if len(arguments) % 2 or not numeric:
        if len(numeric) == len(arguments) or (len(numeric) > 1 and len(arguments) > 1):
            raise DataError(f"{flag} {' '.join(arguments)}: give WEIGHT PREFIX pairs or prefixes alone")
        return list(arguments), None
    if len(numeric) != len(weights):
        raise DataError(f"{flag} {' '.join(arguments)}: give a weight before every prefix, or before none")
    if min(numeric) <= 0 or not math.isfinite(sum(numeric)):
        raise DataError(f"{flag}: weights must be positive numbers, not {' '.join(map(str, numeric))}")
    return list(arguments[1::2]), numeric


def normalise_weights(weights: Sequence[float]) -> list[float]:
    """Return weights that add up to 1, summed as numpy does, to the last bit."""
    array = np.array(weights, dtype=np.float64)
    scaled: list[float] = (array / np.sum(array)).tolist()
    return scaled


def samples_per_dataset(weights: Sequence[float], samples: int, surplus: float = 0.0) -> list[int]:
    """Return the number of samples that each dataset contributes, rounded up.

    Args:
        weights: normalised, one for each dataset.
        samples: number of samples of all datasets together.
        surplus: fraction of additional samples of each dataset.
    """
    return [math.ceil(math.ceil(samples * weight) * (1 + surplus)) for weight in weights]


def blend_order(weights: Sequence[float], size: int) -> tuple[NDArray[np.int16], NDArray[np.int64]]:
    """Return for each of `size` samples the dataset that it comes from, and its index in that dataset.

    Each sample comes from the dataset that is furthest behind its weight: the first with the largest `weight * n - drawn`.
    """
    if len(weights) == 1:
        return np.zeros(size, dtype=np.int16), np.arange(size, dtype=np.int64)
    order = np.empty(size, dtype=np.int16)  # [size]
    share = np.array(weights, dtype=np.float64)
    drawn, deficit = np.zeros(len(weights)), np.empty(len(weights))  # [datasets]
    multiply, subtract = np.multiply, np.subtract
    for n in range(size):  # each choice depends on all earlier ones, so the loop cannot be vectorised
        multiply(share, max(n, 1), out=deficit)
        subtract(deficit, drawn, out=deficit)
        chosen = deficit.argmax()  # the first one of a tie, as in Megatron-Core
        order[n] = chosen
        drawn[chosen] += 1.0
    numbers = np.empty(size, dtype=np.int64)
    for dataset in range(len(weights)):
        is_from_dataset = order == dataset  # bool [size]
        numbers[is_from_dataset] = np.arange(np.count_nonzero(is_from_dataset))
    return order, numbers


class BlendedDataset:
    """A blend of several datasets: sample i is sample `numbers[i]` of dataset `order[i]`.

    Raises:
        DataError: a dataset has fewer samples than the order draws from it.
    """

    def __init__(self, datasets: Sequence[SampleSource], order: NDArray[np.int16], numbers: NDArray[np.int64]) -> None:
        self.datasets, self.order, self.numbers = datasets, order, numbers
        for number, (dataset, drawn) in enumerate(zip(datasets, count_draws(order, len(datasets)), strict=True)):
            if drawn > len(dataset):
                raise DataError(f"blend: {drawn} samples needed from dataset {number + 1}, which has {len(dataset)}")

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, number: int) -> Any:
        if not 0 <= number < len(self):
            raise IndexError(f"sample {number} of {len(self)}")
        return self.datasets[int(self.order[number])][int(self.numbers[number])]

    def locate(self, number: int, position: int) -> str:
        """Return the place of token `position` of a sample, for a message."""
        return self.datasets[int(self.order[number])].locate(int(self.numbers[number]), position)


def count_draws(order: NDArray[np.int16], datasets: int) -> list[int]:
    """Return the number of samples that an order draws from each dataset."""
    return [int(count) for count in np.bincount(order, minlength=datasets)]
