"""The streaming safetensors writer, against the package that reads it."""

import io
import json
import os
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from megatron.checkpoint import storage
from megatron.checkpoint.snapshot import Snapshot
from megatron.checkpoint.storage import CODE_FROM_DTYPE, Storage, TensorEntry, hash_file, stream_safetensors


def entry(key, tensor):
    return TensorEntry(key, tensor.dtype, tuple(tensor.shape), tensor.detach)


def test_every_type_and_shape_comes_back(tmp_path):
    """Odd numbers of narrow elements come between wide ones: each must still start at a multiple of its own width."""
    tensors = {f"{i}{CODE_FROM_DTYPE[d]}": (torch.randn(3, 5) * 9).to(d) for i, d in enumerate(CODE_FROM_DTYPE)}
    tensors |= {"scalar": torch.tensor(7), "empty": torch.zeros(0, 3), "view": torch.arange(12.0).reshape(3, 4).t()[1:, :2]}
    record = Storage().write(tmp_path / "x", stream_safetensors([entry(k, t) for k, t in tensors.items()], {"format": "pt"}))
    assert record == hash_file(tmp_path / "x") and record.bytes == (tmp_path / "x").stat().st_size
    loaded = load_file(tmp_path / "x")
    assert loaded.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert loaded[key].dtype == tensor.dtype and loaded[key].shape == tensor.shape
        assert torch.equal(loaded[key].view(torch.uint8), tensor.contiguous().view(torch.uint8)) if tensor.dim() else True
    raw = (tmp_path / "x").read_bytes()
    size = int.from_bytes(raw[:8], "little")
    for key, about in json.loads(raw[8 : 8 + size]).items():
        if key != "__metadata__":
            assert (8 + size + about["data_offsets"][0]) % tensors[key].itemsize == 0, key


def test_a_tensor_is_asked_for_when_its_turn_comes(tmp_path):
    asked = []

    def give(i):
        asked.append(i)
        return torch.full((4,), float(i))

    stream = stream_safetensors([TensorEntry(str(i), torch.float32, (4,), lambda i=i: give(i)) for i in range(3)])
    next(stream), next(stream)
    assert asked == []
    next(stream)
    assert asked == [0]


@pytest.mark.parametrize(
    "announced",
    [TensorEntry("w", torch.float32, (3,), lambda: torch.zeros(4)), TensorEntry("w", torch.int8, (4,), lambda: torch.zeros(4))],
)
def test_a_tensor_that_is_not_as_announced(announced):
    with pytest.raises(ValueError, match="w was announced as"):
        list(stream_safetensors([announced]))


@pytest.mark.parametrize("worth", [1, 300, 10_000])
def test_a_large_file_goes_in_chunks_with_the_checksum_made_beside(tmp_path, monkeypatch, worth):
    """Chunks of all sizes around the limits, for the second thread and not, on a disk that takes a part at a time."""
    monkeypatch.setattr(storage, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(storage, "MIN_THREADED_BYTES", worth)
    chunks = [torch.randint(256, (n,), dtype=torch.uint8).numpy().data for n in (5, 999, 1000, 1001, 2000, 0, 12_345, 299, 300)]

    class Slow(io.FileIO):
        def write(self, data):
            return super().write(data[:700])

    monkeypatch.setattr(Path, "open", lambda path, mode, **more: Slow(path, mode.replace("b", "")))
    record = Storage().write(tmp_path / "x", chunks)
    monkeypatch.undo()
    assert (tmp_path / "x").read_bytes() == b"".join(chunks)
    assert record == hash_file(tmp_path / "x") and record.bytes == sum(map(len, chunks))


def test_two_may_delete_the_same(tmp_path):
    for i in range(300):
        (tmp_path / "a" / f"{i % 7}").mkdir(parents=True, exist_ok=True)
        (tmp_path / "a" / f"{i % 7}" / f"{i}").touch()
    failures = []

    def remove():
        try:
            Storage().remove(tmp_path / "a")
        except OSError as error:
            failures.append(error)

    threads = [threading.Thread(target=remove) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and not (tmp_path / "a").exists()


def test_free_space_is_that_of_the_disk_or_unknown(tmp_path, monkeypatch):
    free = Storage().free_bytes(tmp_path)
    assert 0 < free < shutil.disk_usage(tmp_path).total
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_blocks=0, f_bavail=0, f_frsize=4096))
    assert Storage().free_bytes(tmp_path) is None, "a file system that does not say is not full"


def test_a_snapshot_of_every_type():
    """Types of all widths side by side, views, scalars and empty tensors; taken twice, also with another size."""
    snapshot = Snapshot(torch.device("cpu"))
    tensors = {
        "a": torch.arange(7, dtype=torch.int8),
        "b": torch.randn(3, 5).to(torch.bfloat16),
        "c": torch.tensor(3, dtype=torch.int64),
        "d": torch.randn(4, 6).t()[1:, ::2],
        "e": torch.zeros(0, 4),
        "f": torch.tensor([True, False, True]),
    }
    entries = [TensorEntry(name, t.dtype, tuple(t.shape), t.detach) for name, t in tensors.items()]
    for some in (entries, entries[:3], entries[:3]):
        taken = {entry.key: entry.data() for entry in snapshot.copy(some)}
        assert snapshot.bytes == sum(entry.bytes for entry in some)
        assert all(torch.equal(taken[e.key], tensors[e.key]) and taken[e.key].dtype == e.dtype for e in some)
    tensors["c"].add_(1)
    assert taken["c"] == 3
