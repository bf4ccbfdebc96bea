"""Operations of a checkpoint on a file system, each durable when it returns, and safetensors files as a stream of bytes.

One object stands between the checkpoint and the disk, so that a test can fail or die at every single step.
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

# The codes of the safetensors format.
DTYPES: dict[torch.dtype, str] = {
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
TORCH_DTYPES = {code: dtype for dtype, code in DTYPES.items()}

CHUNK_BYTES = 1 << 24  # 16 MiB: what is hashed and written at once fits into a processor's cache
MIN_THREADED_BYTES = 1 << 18  # below it, handing a chunk to another thread takes longer than hashing it


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and sha256 of a file, as written."""

    bytes: int
    sha256: str


class Storage:
    """Local or mounted POSIX file system. OSError passes through."""

    def make_directory(self, path: Path) -> None:
        """Create `path` and its parents; no error when it is there."""
        path.mkdir(parents=True, exist_ok=True)

    def free_bytes(self, path: Path) -> int | None:
        """Return the bytes that may still be written under `path`; None when the file system does not say."""
        about = os.statvfs(path)
        return about.f_bavail * about.f_frsize if about.f_blocks else None

    def write(self, path: Path, chunks: Iterable[bytes | memoryview]) -> FileRecord:
        """Write a file and wait until the disk has it. Returns its size and checksum."""
        # A second thread hashes a large chunk while this one writes it. Neither holds Python's lock meanwhile.
        digest, size = hashlib.sha256(), 0
        with open(path, "wb", buffering=0, opener=_no_link) as file, ThreadPoolExecutor(1) as hasher:
            hashed: Future[None] | None = None
            for chunk in _split_chunks(chunks):
                if hashed is not None:
                    hashed.result()  # in order: a digest takes the chunks as they follow one another
                hashed = None
                if len(chunk) < MIN_THREADED_BYTES:
                    digest.update(chunk)
                else:
                    hashed = hasher.submit(digest.update, chunk)
                left = chunk
                while left:  # an unbuffered file may take a part
                    left = left[file.write(left) or 0 :]
                size += len(chunk)
            if hashed is not None:
                hashed.result()
            os.fsync(file.fileno())
        return FileRecord(size, digest.hexdigest())

    def sync(self, path: Path) -> None:
        """Wait until the disk has a file's bytes, or a directory's entries."""
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def rename(self, source: Path, target: Path) -> None:
        """Give `source` the name `target`, atomically, replacing a file of that name."""
        os.replace(source, target)
        self.sync(target.parent)

    def remove(self, path: Path) -> None:
        """Delete a file or a whole directory; no error when it is not there, or when another deletes it as well."""
        while path.is_dir() and not path.is_symlink():
            with suppress(FileNotFoundError):
                shutil.rmtree(path)
        path.unlink(missing_ok=True)


def _no_link(path: str, flags: int) -> int:
    """Open a file itself, never what a link points to: where many may write, somebody can have put a link in its place."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def _split_chunks(chunks: Iterable[bytes | memoryview]) -> Iterator[memoryview]:
    """Yield the same bytes in chunks of at most CHUNK_BYTES."""
    # So both threads are at work all the time, and what both need is in the cache.
    for chunk in chunks:
        view = memoryview(chunk)
        for start in range(0, len(view), CHUNK_BYTES):
            yield view[start : start + CHUNK_BYTES]


def hash_file(path: Path, tell: Callable[[str], None] = lambda what: None) -> FileRecord:
    """Return size and sha256 of a file. OSError when it cannot be read. tell: is called with a line after every chunk."""
    digest, size = hashlib.sha256(), 0
    with open_regular(path) as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
            tell(f"comparing {path} with its checksum, after {size} bytes")
    return FileRecord(size, digest.hexdigest())


@dataclass(frozen=True)
class TensorEntry:
    """Tensor of a safetensors file to be. `data` is called when its turn comes, so that one tensor is held at a time."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    data: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        """Bytes of the tensor in the file."""
        return prod(self.shape) * self.dtype.itemsize


def sort_for_file(entries: Iterable[TensorEntry]) -> list[TensorEntry]:
    """Return the entries as they follow one another in a file: the widest types first, so that every tensor is aligned."""
    return sorted(entries, key=lambda e: (-e.dtype.itemsize, e.key))


def stream_safetensors(entries: Sequence[TensorEntry], metadata: dict[str, str] | None = None) -> Iterator[bytes | memoryview]:
    """Yield the bytes of a safetensors file, one tensor after the other (format: huggingface/safetensors, README).

    ValueError when `data` gives another shape or type.
    """
    # Not by the package, which wants all tensors in memory at once.
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    ordered = sort_for_file(entries)
    for entry in ordered:
        end = offset + entry.bytes
        header[entry.key] = {"dtype": DTYPES[entry.dtype], "shape": list(entry.shape), "data_offsets": [offset, end]}
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
