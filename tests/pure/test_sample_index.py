"""The sample index against arrays that Megatron-Core 0.16.1's GPTDataset built, its C++ part included."""

from __future__ import annotations

import hashlib
import time
from typing import Any

import numpy as np
import pytest

from megatron.data.errors import DataError
from megatron.data.sample_index import SampleIndex, build_sample_index, cut_stream, plan_epochs, shuffle_order

# sha256 over the three arrays and their dtypes, from Megatron-Core 0.16.1, for index_recipe(0), (1), ...
REFERENCE = (
    "a4d2e1c5b938 344f70a0ac13 da41f65d1db2 dfac09cf395f 16dec1bf1d83 c38abd354ccf 40b5146978e0 423cac463f05 "
    "06e0abbcdcc7 20be61fb793b 950338b9699a c1b7528e0a8c 5df9ef298743 b672e8b04568 fb8d66639ef7 160cafa12b65 "
    "67b6f313ed9e 0f3d25ff2ded 4b5950cad8af 48204b56a3a0 4f6fcdaac6f3 44adcd69e78b e3d4fe2c43df 02659c6e35bb "
    "2b5d6154ae72 6278686c02b8 626d2612245e ce61609bd8be 99c50a4da1b1 f9995a2c2a91 7d9ab181d48c a0aa2fa84f15 "
    "2ea21457c2d4 8cb0da5dfe34 ee41bc14980d b935b1742487 55f96644a1ea 0ef50cb7246a 08bcac7f76fa a5680bc4a914 "
    "441b9eeaa3b3 c35d39cb9b67 750235046db1 a87a4a02e6f4 83677ee14416 ebb2e7521dca 881a8f594edb 1db972cae153 "
    "48b9e845e78c a50440657241 cabd75e7fc33 89eede5d2919 af507b6d2da3 0de4267778ad 8870e15f9e7b cb067e9472a2 "
    "7ade9e71d6bc ddf8ea60e904 7d18d7ae8158 40610cc123f2 e354410c3f9a 45e54cd9ce12 bd05482fd0b2 05957c4bc1de"
)


def index_recipe(number: int) -> dict[str, Any]:
    """Arguments of `build_sample_index`: lengths with empty and one-token documents, any split, epochs, both options."""
    random = np.random.RandomState(number)
    while True:
        count = random.randint(1, 60)
        lengths = random.randint(0, (2, 5, 40, 400)[number % 4] + 1, size=count).astype(np.int32)
        first = random.randint(0, count)
        documents = np.arange(first, random.randint(first, count) + 1, dtype=np.int32)
        extra, drop_last = int(random.rand() < 0.7), bool(random.rand() < 0.7)
        # The reference has no answer for a partial last sample after an empty last document.
        if lengths[documents].sum() > 0 and (drop_last or lengths[documents].min() > 0):
            break
    return dict(
        lengths=lengths,
        documents=documents,
        seq_length=int(random.choice([2, 3, 4, 7, 16, 64])),
        seed=int(random.randint(0, 2**31)),
        num_samples=None if random.rand() < 0.1 else int(random.randint(0, 300)),
        extra=extra,
        drop_last=drop_last,
    )


def digest(index: SampleIndex) -> str:
    arrays = (index.documents, index.samples, index.shuffle)
    return hashlib.sha256(b"".join(np.ascontiguousarray(a).tobytes() + str(a.dtype).encode() for a in arrays)).hexdigest()[:12]


def test_equals_the_reference_bit_for_bit() -> None:
    assert [digest(build_sample_index(**index_recipe(i))) for i in range(len(REFERENCE.split()))] == REFERENCE.split()


def test_recipes_cover_the_cases() -> None:
    recipes = [index_recipe(i) for i in range(len(REFERENCE.split()))]
    plans = [
        plan_epochs(int(r["lengths"][r["documents"]].sum()), r["seq_length"], r["num_samples"], r["extra"]) for r in recipes
    ]
    assert {plan.separate_last for plan in plans} == {True, False}
    assert any(plan.epochs > 20 for plan in plans) and any(plan.epochs == 1 for plan in plans)
    assert any((r["lengths"][r["documents"]] == 0).any() for r in recipes) and any(r["num_samples"] is None for r in recipes)
    assert {(r["extra"], r["drop_last"]) for r in recipes} == {(0, False), (0, True), (1, False), (1, True)}


def test_arrays_of_a_small_case() -> None:
    """The order with the last epoch apart, printed by the reference."""
    index = build_sample_index(np.array([5, 3, 7, 4], dtype=np.int32), np.arange(4, dtype=np.int32), 4, 1234, 10)
    assert index.documents.tolist() == [2, 1, 2, 0, 0, 1, 3, 3, 0, 2, 1, 3]
    cuts = [
        [0, 0],
        [0, 4],
        [1, 1],
        [2, 2],
        [2, 6],
        [3, 3],
        [4, 2],
        [5, 1],
        [6, 2],
        [7, 2],
        [8, 2],
        [9, 1],
        [9, 5],
        [10, 2],
        [11, 3],
    ]
    assert index.samples.tolist() == cuts
    assert index.shuffle.tolist() == [7, 3, 5, 1, 4, 8, 0, 2, 6, 13, 10, 12, 9, 11]


@pytest.mark.parametrize("wanted", [0, 5, None])
def test_no_tokens_is_an_error_at_once(wanted: int | None) -> None:
    """The reference counts epochs for ever here."""
    with pytest.raises(DataError, match="0 tokens"):
        build_sample_index(np.zeros(3, dtype=np.int32), np.arange(3, dtype=np.int32), 4, 1, wanted)
    with pytest.raises(DataError):
        build_sample_index(np.ones(3, dtype=np.int32), np.empty(0, dtype=np.int32), 4, 1, wanted)


def test_one_token_and_many_epochs() -> None:
    index = build_sample_index(np.array([1], dtype=np.int32), np.zeros(1, dtype=np.int32), 64, 1, 100)
    assert len(index.shuffle) == 100 and len(index.documents) == 6401


def test_samples_tile_the_stream() -> None:
    """Each sample begins with the last token of the one before it, and no token is left out."""
    random = np.random.RandomState(3)
    lengths = random.randint(0, 9, size=50).astype(np.int32)
    order = np.arange(50, dtype=np.int32)
    cuts = cut_stream(lengths, order, int(lengths.sum()), 7)
    begins = np.concatenate(([0], np.cumsum(lengths)[:-1]))
    assert (begins[order[cuts[:, 0]]] + cuts[:, 1]).tolist() == (np.arange(len(cuts)) * 7).tolist()
    assert (cuts[:, 1] < lengths[order[cuts[:, 0]]])[1:].all()


def test_the_block_size_changes_no_sample_index(monkeypatch: pytest.MonkeyPatch) -> None:
    recipes = [index_recipe(i) for i in range(12)]
    whole = [digest(build_sample_index(**recipe)) for recipe in recipes]
    monkeypatch.setattr("megatron.data.sample_index.BLOCK", 3)
    assert [digest(build_sample_index(**recipe)) for recipe in recipes] == whole


def test_more_tokens_than_32_bits() -> None:
    """Positions beyond 2**31 tokens stay exact."""
    lengths = np.full(5, 2**30 - 7, dtype=np.int32)
    index = build_sample_index(lengths, np.arange(5, dtype=np.int32), 2**20, 1, 10000)
    assert len(index.documents) == 10 and len(index.shuffle) == (10 * (2**30 - 7) - 1) // 2**20
    last_place, last_token = index.samples[-1].tolist()
    assert last_place * (2**30 - 7) + last_token == (len(index.samples) - 1) * 2**20 > 2**33


def test_shuffle_widens_before_it_overflows(monkeypatch: pytest.MonkeyPatch) -> None:
    class Limit:
        max = 100

    monkeypatch.setattr(np, "iinfo", lambda _: Limit)
    assert shuffle_order(98, 98, np.random.RandomState(1)).dtype == np.uint32
    assert shuffle_order(99, 99, np.random.RandomState(1)).dtype == np.int64


def test_a_million_documents_in_seconds() -> None:
    lengths = np.random.RandomState(0).randint(1, 1000, size=1_000_000).astype(np.int32)
    start = time.process_time()
    build_sample_index(lengths, np.arange(len(lengths), dtype=np.int32), 1024, 1234, 500_000)
    assert time.process_time() - start < 6  # ten times that for ten million
