"""GPT samples, splits, blends: their order is the reference's; and the cache of indices."""

from __future__ import annotations

import hashlib
import logging
import multiprocessing
import os
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from recipes import BLENDS, corpus_recipe, write_corpus

from megatron.config.schema import DataConfig
from megatron.data import gpt
from megatron.data.blend import SURPLUS, blend_order, normalise_weights, parse_blend, samples_per_dataset
from megatron.data.build import build_datasets
from megatron.data.errors import DataError
from megatron.data.gpt import GPTDataset, parse_split, split_range
from megatron.data.index_cache import IndexCache
from megatron.data.indexed import IndexedDataset
from megatron.data.sample_index import SampleIndex, build_sample_index

# sha256 over the first samples that Megatron-Core 0.16.1 gives for each of BLENDS, per split; None: no such split.
REFERENCE = [
    ("c66cc6ae3d17", "22dadaa98a98", "77599887bf5f"),
    ("a8f5531eba2b", "22dadaa98a98", "77599887bf5f"),
    ("50fb88b4c4f5", "b83f93164362", None),
    ("73b4110955fb", "c1af3179a79c", "99408334edf8"),
    ("d31e53f8c7ab", "566967e6c5fb", None),
    ("cf746558b9dd", None, None),
    ("2ea7194fca3a", "709f08a87aa6", "301d1bd33f0a"),
]


@pytest.fixture
def corpora(tmp_path: Path) -> Path:
    for number in range(3):
        write_corpus(tmp_path / f"p{number}", corpus_recipe(number))
    return tmp_path


def place(words: Any, folder: Path) -> tuple[str, ...]:
    return tuple(str(folder / word) if word.startswith("p") else word for word in words)


@pytest.mark.parametrize("number", range(len(BLENDS)))
def test_samples_equal_the_reference(corpora: Path, number: int) -> None:
    words, split, seed, seq_length, counts = BLENDS[number]
    if split is None:
        train, valid, test = (place(w, corpora) for w in words)
        data = DataConfig(train_data_path=train, valid_data_path=valid, test_data_path=test, seq_length=seq_length)
    else:
        data = DataConfig(data_path=place(words, corpora), split=split, seq_length=seq_length)
    found = []
    for dataset, count in zip(build_datasets(data, seed, counts), counts, strict=True):
        if dataset is None:
            found.append(None)
        else:
            samples = [dataset[i].tokens for i in range(min(count, len(dataset)))]
            content = b"".join(s.tobytes() + b"int64" for s in samples)
            found.append(hashlib.sha256(content).hexdigest()[:12])
    assert tuple(found) == REFERENCE[number]


def test_blend_order_of_the_reference() -> None:
    order, numbers = blend_order(normalise_weights([0.2, 0.3, 0.5]), 10)
    assert order.tolist() == [2, 1, 0, 2, 1, 2, 0, 2, 1, 2]
    assert numbers.tolist() == [0, 0, 0, 1, 1, 2, 1, 3, 2, 4]


def test_surplus_of_the_reference() -> None:
    assert [samples_per_dataset([0.3, 0.7], n, SURPLUS) for n in (10000, 999, 1)] == [[3015, 7035], [302, 704], [2, 2]]


@pytest.mark.parametrize(
    ("split", "sequences", "borders"),
    [
        ("949,50,1", 1000, [(0, 949), (949, 999), (999, 1000)]),
        ("98,2,0", 101, [(0, 99), (99, 101), None]),
        ("1", 7, [(0, 7), None, None]),
        ("0.5/0.5", 5, [(0, 2), (2, 5), None]),
        ("969, 30, 1", 10, [(0, 10), (10, 10), (10, 10)]),
    ],
)
def test_split_borders_are_those_of_megatron(split: str, sequences: int, borders: list[tuple[int, int] | None]) -> None:
    ranges = [None if share is None else split_range(share, sequences) for share in parse_split(split)]
    assert [None if r is None else (r.start, r.stop) for r in ranges] == borders


@pytest.mark.parametrize("split", ["", "a,b", "1,2,3,4", "0,0,0", "-1,2", "nan,1", "1,inf"])
def test_a_wrong_split_is_refused(split: str) -> None:
    with pytest.raises(DataError, match="--split"):
        parse_split(split)


def test_blend_words() -> None:
    assert parse_blend(["a"]) == (["a"], None)
    assert parse_blend(["a", "b"]) == (["a", "b"], None)
    assert parse_blend(["1", "a", "2.5", "b"]) == (["a", "b"], [1.0, 2.5])
    for wrong in (["1", "a", "b", "c"], ["0", "a", "1", "b"], ["-1", "a"], ["nan", "a"], ["1", "a", "2"]):
        with pytest.raises(DataError, match="--data-path"):
            parse_blend(wrong)


def test_sample_content_and_location(tmp_path: Path) -> None:
    """One epoch holds every pair of neighbours once, and a token is found in the file it came from."""
    prefix = write_corpus(tmp_path / "p", [[np.arange(i * 10, i * 10 + n)] for i, n in enumerate((3, 0, 5, 1, 8))])
    dataset = GPTDataset(IndexedDataset(prefix), range(5), 4, 1, None)
    assert len(dataset) == 4
    for number in range(len(dataset)):
        tokens = dataset[number].tokens
        assert tokens.shape == (5,) and tokens.dtype == np.int64
        for position, token in enumerate(tokens.tolist()):
            assert dataset.locate(number, position) == f"{prefix}.bin, document {token // 10}, token {token % 10}"
    with pytest.raises(IndexError):
        dataset[4]


def test_empty_split_is_an_error_at_once(corpora: Path) -> None:
    """Megatron-Core hangs here."""
    data = DataConfig(data_path=(str(corpora / "p0"),), split="1000000,1,0", seq_length=4)
    start = time.monotonic()
    with pytest.raises(DataError, match=r"validation split has 0 of \d+ documents.*--split"):
        build_datasets(data, 1, (10, 10, 0))
    assert time.monotonic() - start < 60
    training, validation, test = build_datasets(data, 1, (10, 0, 0))
    assert training is not None and validation is None and test is None


def test_blend_without_weights_cannot_repeat(corpora: Path) -> None:
    data = DataConfig(data_path=(str(corpora / "p0"), str(corpora / "p2")), split="1", seq_length=4)
    with pytest.raises(DataError, match="100000 training samples needed, but one epoch"):
        build_datasets(data, 1, (100000, 0, 0))


def test_wrong_data_paths_are_refused(corpora: Path) -> None:
    with pytest.raises(DataError, match=r"nothere.*not found"):
        build_datasets(DataConfig(data_path=(str(corpora / "nothere"),), seq_length=4), 1, (1, 0, 0))
    with pytest.raises(DataError, match="--data-path"):
        build_datasets(DataConfig(seq_length=4), 1, (1, 0, 0))
    with pytest.raises(DataError, match="excludes"):
        build_datasets(DataConfig(data_path=("a",), train_data_path=("b",), seq_length=4), 1, (1, 0, 0))


def first_samples(folder: Path, **changes: Any) -> list[list[int]]:
    data = DataConfig(**{"data_path": (str(folder / "p0"),), "split": "1", "seq_length": 8, **changes})
    training, _, _ = build_datasets(data, 1, (60, 0, 0))
    assert training is not None
    return [training[i].tokens.tolist() for i in range(60)]


def test_cache_is_used_and_noticed_to_be_stale(corpora: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    before = first_samples(corpora)
    assert "from cache" not in caplog.text
    assert first_samples(corpora) == before and "from cache" in caplog.text
    write_corpus(corpora / "p0", corpus_recipe(7))
    os.utime(corpora / "p0.idx", ns=(1, 12345))
    caplog.clear()
    after = first_samples(corpora)
    assert after != before and "changed since" in caplog.text
    assert after == first_samples(corpora, data_cache_path=str(corpora / "elsewhere"))


def test_damaged_cache_is_rebuilt(corpora: Path) -> None:
    before = first_samples(corpora)
    for array in (corpora / "cache").glob("*/*/*.npy"):
        array.write_bytes(array.read_bytes()[:100])
    assert first_samples(corpora) == before
    assert not list((corpora / "cache").glob("*/*.tmp"))


def test_unwritable_cache_warns_and_works(corpora: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = first_samples(corpora)
    (corpora / "file").write_text("")
    assert first_samples(corpora, data_cache_path=str(corpora / "file")) == before
    assert "builds its index in memory" in caplog.text


def hold_lock(folder: str, ready: Any) -> None:
    def build() -> dict[str, Any]:
        ready.set()
        time.sleep(60)
        return {}

    IndexCache(folder).get(f"{folder}/x", {"key": 1}, build)


def test_killed_builder_does_not_block_others(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=hold_lock, args=(str(tmp_path), ready))
    process.start()
    assert ready.wait(30)
    impatient = IndexCache(str(tmp_path), timeout=0.1).get("x", {"key": 1}, lambda: {"a": np.arange(3)})
    assert impatient["a"].tolist() == [0, 1, 2] and not list(tmp_path.glob("*/*/a.npy"))  # built in memory
    process.kill()
    process.join()
    start = time.monotonic()
    found = IndexCache(str(tmp_path)).get("x", {"key": 1}, lambda: {"a": np.arange(3)})
    assert found["a"].tolist() == [0, 1, 2] and time.monotonic() - start < 60
    assert len(list(tmp_path.glob("*/*/a.npy"))) == 1


def build_at_once(folder: Path, barrier: Any, results: Any) -> None:
    builds = []

    def build(*args: Any) -> SampleIndex:
        builds.append(args)
        time.sleep(0.2)
        return build_sample_index(*args)

    gpt.build_sample_index = build
    barrier.wait(60)
    samples = first_samples(folder)
    results.put((samples, len(builds)))


def test_processes_that_start_together(corpora: Path) -> None:
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(3), context.Queue()
    processes = [context.Process(target=build_at_once, args=(corpora, barrier, results)) for _ in range(3)]
    for process in processes:
        process.start()
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    expected = first_samples(corpora, data_cache_path=str(corpora / "own"))
    assert [samples for samples, _ in found] == [expected] * 3
    assert sum(builds for _, builds in found) == 1  # the others waited
    assert len(list((corpora / "cache").glob("*/*/about.json"))) == 1


def test_a_blend_of_more_files_than_may_be_open(tmp_path: Path) -> None:
    words: list[str] = []
    for number in range(60):
        words += ["1", write_corpus(tmp_path / f"p{number}", [[np.arange(number, number + 20)]])]
    data = DataConfig(data_path=tuple(words), split="1", seq_length=8)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, hard))
    try:
        for _ in range(2):  # built, then from the cache
            training, _, _ = build_datasets(data, 1, (600, 0, 0))
            assert training is not None and len({int(training[i].tokens[0]) for i in range(120)}) > 59
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
