"""Indexed datasets: the bytes, both ways, and files that are not what they should be."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from recipes import corpus_recipe, write_corpus

from megatron.data.errors import DataError
from megatron.data.indexed import IndexedDataset, IndexedWriter, token_dtype
from megatron.data.merge import find_prefixes, merge_datasets
from megatron.files.outputs import OutputError

GOLDEN_IDX = bytes.fromhex(
    "4d4d49444958450000" "0100000000000000" "08" "0300000000000000" "0300000000000000"
    "03000000" "02000000" "01000000"
    "0000000000000000" "0600000000000000" "0a00000000000000"
    "0000000000000000" "0100000000000000" "0300000000000000"
).replace(b"MMIDIXE", b"MMIDIDX")  # fmt: skip
GOLDEN_BIN = bytes.fromhex("010002000300040005000600")


def golden(folder: Path) -> str:
    prefix = folder / "golden"
    prefix.with_suffix(".idx").write_bytes(GOLDEN_IDX)
    prefix.with_suffix(".bin").write_bytes(GOLDEN_BIN)
    return str(prefix)


def test_writer_gives_the_reference_bytes(tmp_path: Path) -> None:
    """The 94 bytes that Megatron-LM writes for the documents [1 2 3] and [4 5][6] and a vocabulary of 50257."""
    with IndexedWriter(str(tmp_path / "a"), token_dtype(50257)) as writer:
        writer.add_document(np.array([1, 2, 3]), [3])
        writer.add_document(np.array([4, 5, 6]), [2, 1])
        writer.finish()
    assert (tmp_path / "a.idx").read_bytes() == GOLDEN_IDX and len(GOLDEN_IDX) == 94
    assert (tmp_path / "a.bin").read_bytes() == GOLDEN_BIN


@pytest.mark.parametrize(("number", "expected"), [(0, "efa277b28705"), (1, "df328e804ef1"), (2, "30c5b94eca8f")])
def test_larger_files_equal_those_of_megatron_core(tmp_path: Path, number: int, expected: str) -> None:
    """With empty sequences and documents; digests of what IndexedDatasetBuilder of Megatron-Core 0.16.1 wrote."""
    prefix = write_corpus(tmp_path / "p", corpus_recipe(number))
    data = Path(prefix + ".bin").read_bytes() + Path(prefix + ".idx").read_bytes()
    assert hashlib.sha256(data).hexdigest()[:12] == expected


def test_reader_reads_reference_bytes(tmp_path: Path) -> None:
    dataset = IndexedDataset(golden(tmp_path))
    assert [dataset[i].tolist() for i in range(len(dataset))] == [[1, 2, 3], [4, 5], [6]]
    assert (
        dataset.get(0, 1).tolist() == [2, 3]
        and dataset.get(0, 1, 2).tolist() == [2]
        and dataset.get(1, 0, 99).tolist() == [4, 5]
    )
    assert (dataset.document_count, dataset.token_count, dataset.meta()) == (2, 6, {})
    assert IndexedDataset(str(tmp_path / "golden.bin")).prefix == dataset.prefix


@pytest.mark.parametrize(("size", "name"), [(65499, "uint16"), (65500, "int32"), (257, "uint16"), (250000, "int32")])
def test_the_token_dtype_follows_the_vocabulary_size(size: int, name: str) -> None:
    assert token_dtype(size).name == name


def overwrite(offset: int, code: str, value: int) -> Callable[[bytearray], None]:
    return lambda data: struct.pack_into(code, data, offset, value)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (overwrite(0, "<B", 0), "not an index"),
        (overwrite(9, "<Q", 2), "version 2"),
        (overwrite(17, "<B", 6), "code 6"),
        (overwrite(17, "<B", 99), "code 99"),
        (overwrite(18, "<Q", 4), "truncated"),
        (overwrite(18, "<Q", 2**63), "truncated"),
        (overwrite(26, "<Q", 0), "too long"),
        (overwrite(34, "<i", -3), "negative"),
        (overwrite(34, "<i", 4), "sequence 1 does not begin"),
        (overwrite(42, "<i", 2), "golden.bin: truncated"),
        (overwrite(46, "<q", 2), "sequence 0 does not begin"),
        (overwrite(54, "<q", 2**62), "sequence 1 does not begin"),
        (overwrite(70, "<q", 1), "do not run from"),
        (overwrite(86, "<q", 4), "do not run from"),
        (overwrite(78, "<q", 4), "not in order"),
        (overwrite(78, "<q", -1), "not in order"),
    ],
)
def test_a_hostile_index_is_refused(tmp_path: Path, damage: Callable[[bytearray], None], reason: str) -> None:
    prefix = golden(tmp_path)
    data = bytearray(GOLDEN_IDX)
    damage(data)
    Path(prefix + ".idx").write_bytes(data)
    with pytest.raises(DataError, match=reason) as caught:
        IndexedDataset(prefix)
    assert prefix in str(caught.value)


def test_every_truncation_is_found(tmp_path: Path) -> None:
    prefix = golden(tmp_path)
    for length in range(len(GOLDEN_IDX)):
        Path(prefix + ".idx").write_bytes(GOLDEN_IDX[:length])
        with pytest.raises(DataError, match=r"golden\.idx"):
            IndexedDataset(prefix)
    Path(prefix + ".idx").write_bytes(GOLDEN_IDX)
    for length in range(len(GOLDEN_BIN)):
        Path(prefix + ".bin").write_bytes(GOLDEN_BIN[:length])
        with pytest.raises(DataError, match=r"golden\.bin: truncated"):
            IndexedDataset(prefix)


def test_other_files_are_refused(tmp_path: Path) -> None:
    prefix = golden(tmp_path)
    Path(prefix + ".idx").write_bytes(b"TNTIDX\x00\x00" + bytes(100))
    with pytest.raises(DataError, match="lazy/cached"):
        IndexedDataset(prefix)
    with pytest.raises(DataError, match="golden"):
        IndexedDataset(str(tmp_path / "golde"))  # names the dataset that is there
    Path(prefix + ".idx").write_bytes(GOLDEN_IDX + bytes(3))  # 3 modes of a multimodal dataset
    assert len(IndexedDataset(prefix)) == 3


def test_nothing_half_written(tmp_path: Path) -> None:
    prefix = golden(tmp_path)
    with pytest.raises(RuntimeError), IndexedWriter(prefix, token_dtype(100)) as writer:
        writer.add_document(np.arange(9), [9])
        raise RuntimeError
    assert sorted(p.name for p in tmp_path.iterdir()) == ["golden.bin", "golden.idx"]
    assert IndexedDataset(prefix).token_count == 6


def test_ids_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with IndexedWriter(str(tmp_path / "a"), token_dtype(100)) as writer, pytest.raises(DataError, match="70000"):
        writer.add_document(np.array([1, 70000]), [2])


def test_empty_dataset(tmp_path: Path) -> None:
    assert len(IndexedDataset(write_corpus(tmp_path / "a", []))) == 0
    assert IndexedDataset(write_corpus(tmp_path / "b", [[], [np.empty(0, dtype=np.int64)]])).document_count == 2


def test_merged_datasets_equal_one_written_directly(tmp_path: Path) -> None:
    parts = [corpus_recipe(i) for i in range(3)]
    prefixes = [write_corpus(tmp_path / "in" / f"p{i}", part) for i, part in enumerate(parts)]
    assert find_prefixes([str(tmp_path / "in")]) == prefixes
    merge_datasets(prefixes, str(tmp_path / "joined"))
    write_corpus(tmp_path / "direct", [document for part in parts for document in part])
    for end in (".bin", ".idx"):
        assert (tmp_path / f"joined{end}").read_bytes() == (tmp_path / f"direct{end}").read_bytes()


def test_merge_refuses_what_does_not_belong(tmp_path: Path) -> None:
    narrow = write_corpus(tmp_path / "narrow", corpus_recipe(0))
    wide = write_corpus(tmp_path / "wide", corpus_recipe(0), "<i4")
    with pytest.raises(DataError, match="int32"):
        merge_datasets([narrow, wide], str(tmp_path / "out"))
    with pytest.raises(OutputError, match="which this command reads"):
        merge_datasets([narrow, wide], narrow)
    for number, prefix in enumerate((narrow, wide)):
        Path(prefix + ".meta.json").write_text(f'{{"tokenizer_digest": "{number}", "tokenizer_type": "T{number}"}}')
    with pytest.raises(DataError, match=r"T0.*T1"):
        merge_datasets([narrow, wide], str(tmp_path / "out"))
    assert not (tmp_path / "out.idx").exists()
