"""File system operations of checkpoints, and the safetensors format as a stream of bytes.

All changes of a save to the disk go through one `Storage` object, so that a test can make every single step fail or die.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megatron.files.regular import open_regular

# Names of dtypes in the safetensors format.
CODE_FROM_DTYPE: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPE_FROM_CODE = {code: dtype for dtype, code in CODE_FROM_DTYPE.items()}

CHUNK_BYTES = 1 << 24  # 16 MiB, so that a chunk is still in the processor's cache when it is read for the second time
MIN_THREADED_BYTES = 1 << 18  # handing a smaller chunk to another thread takes longer than hashing it


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and sha256 of a file, as written."""

    bytes: int
    sha256: str


class Storage:
    """Operations on a local or mounted POSIX file system. All of them may raise OSError."""

    def make_directory(self, path: Path) -> None:
        """Create `path` and its parents, if they do not exist."""
        path.mkdir(parents=True, exist_ok=True)

    def free_bytes(self, path: Path) -> int | None:
        """Return the free bytes of the file system of `path`; None if it does not report them."""
        stats = os.statvfs(path)
        return stats.f_bavail * stats.f_frsize if stats.f_blocks else None

    def write(self, path: Path, chunks: Iterable[bytes | memoryview]) -> FileRecord:
        """Write a file, flush it to disk, and return its size and checksum."""
        # A second thread hashes a large chunk while this thread writes it. Hashing and writing both release the GIL.
        digest, size = hashlib.sha256(), 0
        with open(path, "wb", buffering=0, opener=_open_without_links) as file, ThreadPoolExecutor(1) as hasher:
            hashed: Future[None] | None = None
            for chunk in _split_chunks(chunks):
                if hashed is not None:
                    hashed.result()  # the digest must be updated in the order of the chunks
                hashed = None
                if len(chunk) < MIN_THREADED_BYTES:
                    digest.update(chunk)
                else:
                    hashed = hasher.submit(digest.update, chunk)
                unwritten = chunk
                while unwritten:  # an unbuffered write may be partial
                    unwritten = unwritten[file.write(unwritten) or 0 :]
                size += len(chunk)
            if hashed is not None:
                hashed.result()
            os.fsync(file.fileno())
        return FileRecord(size, digest.hexdigest())

    def sync(self, path: Path) -> None:
        """Flush a file's bytes or a directory's entries to disk."""
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def rename(self, source: Path, target: Path) -> None:
        """Rename `source` to `target` atomically, replacing a file of that name, and flush the directory to disk."""
        os.replace(source, target)
        self.sync(target.parent)

    def remove(self, path: Path) -> None:
        """Delete a file or a directory tree. It may be missing already, and another process may be deleting it too."""
        while path.is_dir() and not path.is_symlink():
            with suppress(FileNotFoundError):
                shutil.rmtree(path)
        path.unlink(missing_ok=True)


def _open_without_links(path: str, flags: int) -> int:
    """Open a file, but never through a symlink, which someone may have planted in a shared directory."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def _split_chunks(chunks: Iterable[bytes | memoryview]) -> Iterator[memoryview]:
    """Yield the same bytes in chunks of at most CHUNK_BYTES."""
    # Small chunks keep both threads busy and stay in the processor's cache.
    for chunk in chunks:
        view = memoryview(chunk)
        for start in range(0, len(view), CHUNK_BYTES):
            yield view[start : start + CHUNK_BYTES]


def hash_file(path: Path, report: Callable[[str], None] = lambda progress: None) -> FileRecord:
    """Return size and sha256 of a file. OSError if it cannot be read. report: called with a line of progress per chunk."""
    digest, size = hashlib.sha256(), 0
    with open_regular(path) as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
            report(f"hashing {path} after {size} bytes")
    return FileRecord(size, digest.hexdigest())


@dataclass(frozen=True)
class TensorEntry:
    """Tensor to be written to a safetensors file.

    data: function that returns the tensor. It is called only when the tensor is written, so that one copy exists at a time.
    """

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    data: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        """Number of bytes of the tensor in the file."""
        return prod(self.shape) * self.dtype.itemsize


def sort_for_file(entries: Iterable[TensorEntry]) -> list[TensorEntry]:
    """Return the entries in the order of the file: the widest dtypes first, so that every tensor is aligned."""
    return sorted(entries, key=lambda e: (-e.dtype.itemsize, e.key))


def stream_safetensors(entries: Sequence[TensorEntry], metadata: dict[str, str] | None = None) -> Iterator[bytes | memoryview]:
    """Yield the bytes of a safetensors file, one tensor after the other (format: huggingface/safetensors, README).

    ValueError when an entry's `data` returns another shape or dtype than the entry.
    """
    # The safetensors package is not used, because it needs all tensors in memory at once.
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    ordered = sort_for_file(entries)
    for entry in ordered:
        end = offset + entry.bytes
        header[entry.key] = {"dtype": CODE_FROM_DTYPE[entry.dtype], "shape": list(entry.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the header is padded, so that the tensors behind it are aligned
    yield len(text).to_bytes(8, "little")
    yield text
    for entry in ordered:
        tensor = entry.data().detach()
        if tensor.shape != entry.shape or tensor.dtype != entry.dtype:
            got = f"{tuple(tensor.shape)} {tensor.dtype}"
            raise ValueError(f"{entry.key} was announced as {entry.shape} {entry.dtype}, got {got}")
        if entry.bytes:
            raw: np.ndarray[tuple[int], np.dtype[np.uint8]] = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            yield raw.data
