"""Wrong data stop a run on the host, with file, document and position; an index cache of strangers is not believed."""

from __future__ import annotations

import json
import os
import pickle
import struct
import time
from pathlib import Path

import numpy as np
import pytest
from recipes import write_corpus

from megatron.config.schema import DataConfig, DataSettings
from megatron.data.batch import GPTCollator
from megatron.data.build import build_datasets
from megatron.data.errors import DataError
from megatron.data.gpt import GPTDataset
from megatron.data.index_cache import IndexCache, load_arrays
from megatron.data.indexed import IndexedDataset, IndexedWriter
from megatron.data.loader import MicroBatchLoader
from megatron.data.sample_index import SampleIndex


def text(prefix: Path, documents: int = 20, first: int = 0) -> str:
    """Documents of nine tokens, with a sidecar."""
    with IndexedWriter(str(prefix), np.dtype("<u2")) as writer:
        for number in range(documents):
            writer.add_document((np.arange(9) + first + number) % 100, [9])
        writer.finish({"tokenizer_type": "T"})
    return str(prefix)


def loader(prefix: str, vocab: int = 100, read_ahead: int = 2) -> MicroBatchLoader:
    training, _, _ = build_datasets(DataConfig(data_path=(prefix,), split="1", seq_length=4), 1, (40, 0, 0))
    assert training is not None
    return MicroBatchLoader(training, GPTCollator.from_config(DataSettings(), vocab, None), 0, 1, 2, read_ahead=read_ahead)


@pytest.mark.parametrize("read_ahead", [0, 2])
def test_an_id_beyond_the_vocabulary_is_named(tmp_path, read_ahead):
    """In the thread that reads ahead or not, out of several files."""
    good = text(tmp_path / "good")
    with IndexedWriter(str(tmp_path / "bad"), np.dtype("<u2")) as writer:
        writer.add_document(np.arange(7), [7])
        writer.add_document(np.array([1, 2, 60000, 4, 5, 6, 7]), [7])
        writer.finish()
    data = DataConfig(data_path=("1", good, "1", str(tmp_path / "bad")), split="1", seq_length=4)
    training, _, _ = build_datasets(data, 1, (10, 0, 0))
    batches = MicroBatchLoader(training, GPTCollator.from_config(DataSettings(), 100, None), 0, 1, 2, read_ahead=read_ahead)
    with pytest.raises(DataError, match=r"bad\.bin, document 1, token 2: id 60000 is outside of the vocabulary of 100 ids"):
        for _ in range(5):
            batches.next_batches(2)


@pytest.mark.parametrize("read_ahead", [0, 2])
@pytest.mark.parametrize("how", ["cut", "rewritten", "replaced", "gone"])
def test_a_file_that_changes_while_it_is_read(tmp_path, how, read_ahead):
    """A cut file would end the process with SIGBUS, not with an exception: it is looked at before it is read."""
    prefix = text(tmp_path / "a")
    path = Path(prefix + ".bin")
    batches = loader(prefix, read_ahead=read_ahead)
    batches.next_batches(2)
    if how == "gone":
        path.unlink()
    elif how == "replaced":
        (tmp_path / "new").write_bytes(path.read_bytes())
        (tmp_path / "new").replace(path)
    else:
        with path.open("r+b") as file:
            file.write(bytes(4)) if how == "rewritten" else file.truncate(8)
        os.utime(path, ns=(1, time.time_ns() + 10**9))
    with pytest.raises(DataError, match=r"a\.bin: it (was changed or replaced|disappeared) while it was being read"):
        for _ in range(10):
            batches.next_batches(2)


def test_the_index_of_another_file(tmp_path):
    short, long = text(tmp_path / "short", 5), text(tmp_path / "long", 6)
    Path(short + ".meta.json").unlink()
    Path(short + ".bin").write_bytes(Path(long + ".bin").read_bytes())
    with pytest.raises(DataError, match=r"short\.bin: not the file of its index: 108 bytes, .*short\.idx needs 90"):
        IndexedDataset(short)
    Path(short + ".bin").write_bytes(Path(long + ".bin").read_bytes()[:80])
    with pytest.raises(DataError, match=r"short\.bin: truncated: 80 bytes, .*short\.idx needs 90"):
        IndexedDataset(short)


def test_the_sidecar_tells_files_of_one_size_apart(tmp_path):
    one, other = text(tmp_path / "one"), text(tmp_path / "other", first=50)
    assert IndexedDataset(one).token_count == IndexedDataset(other).token_count
    Path(one + ".bin").write_bytes(Path(other + ".bin").read_bytes())
    with pytest.raises(DataError, match=r"one\.bin: it has other tokens than the file that .*one\.meta\.json was written with"):
        IndexedDataset(one)
    Path(one + ".meta.json").write_bytes(Path(text(tmp_path / "more", 21) + ".meta.json").read_bytes())
    with pytest.raises(DataError, match=r"one\.meta\.json: it is of a dataset with documents 21, .*one\.idx has 20"):
        IndexedDataset(one)
    Path(one + ".meta.json").unlink()
    assert len(IndexedDataset(one)) == 20, "without a sidecar all is well"


@pytest.mark.parametrize("content", ["{", "[]", "[" * 100_000, "\x00", '{"tokens": "many"}'])
def test_a_damaged_sidecar_is_refused(tmp_path, content):
    prefix = text(tmp_path / "a")
    Path(prefix + ".meta.json").write_text(content)
    with pytest.raises(DataError, match=r"a\.meta\.json: "):
        IndexedDataset(prefix)


class Canary:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_a_pickle_in_place_of_a_dataset_is_not_run(tmp_path):
    prefix = text(tmp_path / "a")
    for end in (".idx", ".meta.json", ".bin"):
        good = Path(prefix + end).read_bytes()
        Path(prefix + end).write_bytes(pickle.dumps(Canary(tmp_path / "canary")))
        with pytest.raises(DataError, match=f"a{end}: "):
            IndexedDataset(prefix)
        Path(prefix + end).write_bytes(good)
    assert len(IndexedDataset(prefix)) == 20 and not (tmp_path / "canary").exists()


def test_a_pickle_in_the_index_cache_is_not_run(tmp_path):
    canary, prefix = tmp_path / "canary", text(tmp_path / "a")
    before = [b.tokens.tolist() for b in loader(prefix, read_ahead=0).next_batches(8)]
    arrays = sorted((tmp_path / "cache").glob("*/*/*"))
    assert len(arrays) == 4
    for path in arrays:
        good = path.read_bytes()
        objects = np.array([Canary(canary)], dtype=object)
        with path.open("wb") as file:
            np.save(file, objects, allow_pickle=True)
        assert [b.tokens.tolist() for b in loader(prefix, read_ahead=0).next_batches(8)] == before
        path.write_bytes(pickle.dumps(Canary(canary)))
        assert [b.tokens.tolist() for b in loader(prefix, read_ahead=0).next_batches(8)] == before
        assert path.read_bytes() == good, "built anew"
    assert not canary.exists()


def npy(header: str, data: bytes = b"") -> bytes:
    text = header.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data


@pytest.mark.parametrize(
    "content",
    [
        b"", b"PK\x03\x04" + bytes(100), b"PK\x05\x06" + bytes(18), npy("{"), npy("(" * 5000), npy("None"),
        npy("{'descr': '<i4', 'fortran_order': False, 'shape': (1000000000000000,)}"),
        npy("{'descr': '<i4', 'fortran_order': False, 'shape': (-5,)}"),
        npy("{'descr': '<i4', 'fortran_order': False, 'shape': (99999999999999999999999,)}"),
        npy("{'descr': '|O', 'fortran_order': False, 'shape': (3,)}", pickle.dumps([1, 2, 3])),
        npy("{'descr': '<f4', 'fortran_order': False, 'shape': (3,)}", bytes(12)),
        npy("{'descr': [('a', '<i4')], 'fortran_order': False, 'shape': (3,)}", bytes(12)),
    ],
)  # fmt: skip
def test_damaged_cached_arrays_are_not_loaded(tmp_path, content):
    (tmp_path / "a.npy").write_bytes(content)
    for shape in ([3], [10**15], [99999999999999999999999], [-5]):
        (tmp_path / "about.json").write_text(json.dumps({"arrays": {"a": shape}}))
        assert load_arrays(tmp_path) is None


@pytest.mark.parametrize("about", ['{"arrays": {"../a": [3]}}', '{"arrays": 3}', "[" * 100_000, '{"arrays": {"a": [4]}}', "{}"])
def test_a_cache_that_lies_about_its_arrays(tmp_path, about):
    np.save(tmp_path / "a.npy", np.arange(3))
    (tmp_path / "about.json").write_text('{"arrays": {"a": [3]}}')
    assert load_arrays(tmp_path)["a"].tolist() == [0, 1, 2]
    (tmp_path / "about.json").write_text(about)
    assert load_arrays(tmp_path) is None


@pytest.mark.parametrize(
    ("array", "value"),
    [("shuffle", 10**6), ("shuffle", -1), ("samples", 10**6), ("samples", -1), ("documents", 99), ("documents", -1)],
)
def test_an_index_that_leads_out_of_the_dataset(tmp_path, array, value):
    dataset = GPTDataset(IndexedDataset(text(tmp_path / "a")), range(20), 4, 1, 10, cache=IndexCache(str(tmp_path / "here")))
    arrays = {name: np.array(getattr(dataset.index, name), dtype=np.int64) for name in ("documents", "samples", "shuffle")}
    arrays[array].reshape(-1)[:] = value
    dataset.index = SampleIndex(**arrays)
    with pytest.raises(DataError, match=r"a: its index cache in .*here is damaged: sample 0 .*; delete it"):
        dataset[0]


def test_an_unknown_id_among_the_shown_documents(tmp_path, capsys, monkeypatch):
    import runpy

    prefix = write_corpus(tmp_path / "p", [[np.array([1, 2])], [np.array([3, 400])]])
    tool = runpy.run_path(str(Path(__file__).parents[2] / "tools" / "inspect_dataset.py"))
    with pytest.raises(tool["DataError"], match=r"p\.bin, document 1, token 1: id 400 is outside of the vocabulary of 257"):
        tool["main"]([prefix, "--tokenizer-type", "ByteTokenizer"])
