"""Read and write indexed datasets: token sequences in `PREFIX.bin`, their bounds in `PREFIX.idx`.

The format is Megatron-LM's memory-mapped one, byte for byte. All numbers are little endian:

    .idx  9 bytes  magic        uint64  version, 1        uint8  number format of a token
          uint64   n, sequences                           uint64 m, documents + 1
          int32[n] tokens of each sequence                int64[n] byte offset of each sequence in .bin
          int64[m] the sequence at which each document starts: first 0, last n
    .bin  the tokens of all sequences, one after the other

A document is one sequence, or one per sentence. An optional third file, `PREFIX.meta.json`, is this project's own: it names the
tokenizer, the number of tokens, and a digest of the beginning and end of the .bin.

Opening a dataset checks every number in the index against the files, and raises DataError for any mismatch.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import resource
import struct
from array import array
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron.data.errors import DataError
from megatron.files.foreign import LFS_POINTER, is_lfs_pointer
from megatron.files.pending import PendingFile, remove_leftovers
from megatron.files.regular import check_regular, error_reason, open_regular, read_json

MAGIC = b"MMIDIDX\x00\x00"
LEGACY_MAGIC = b"TNTIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")  # magic, version, token format, sequences, document bounds
# Megatron-LM's codes; 6 and 7 are floating-point formats, which token ids do not have.
DTYPE_CODES: Mapping[int, np.dtype[Any]] = {
    1: np.dtype("u1"),
    2: np.dtype("i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    8: np.dtype("<u2"),
}
DATASET_SUFFIXES = (".bin", ".idx", ".meta.json")
COPY_CHUNK = 1 << 24  # tokens or sequences that are processed at a time, which bounds memory
MMAP_MIN_BYTES = 1 << 20  # smaller indices are read into memory
DIGEST_BYTES = 1 << 16  # bytes at each end of a .bin that its digest covers


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the number format for a vocabulary of this size, by Megatron-LM's rule: uint16 below 65500, else int32."""
    return np.dtype("<u2") if vocab_size < 65500 else np.dtype("<i4")


def raise_open_file_limit(count: int) -> None:
    """Raise this process's soft limit of open files to `count`, or to the hard limit: each dataset keeps one file open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < count:
        resource.setrlimit(resource.RLIMIT_NOFILE, (count if hard == resource.RLIM_INFINITY else min(count, hard), hard))


def check_prefix(prefix: str) -> str:
    """Return a prefix without a trailing `.bin` or `.idx`; DataError if one of the two files is missing."""
    if prefix.endswith((".bin", ".idx")):
        prefix = prefix[:-4]
    missing = [prefix + end for end in (".idx", ".bin") if not os.path.lexists(prefix + end)]
    if missing:
        folder = os.path.dirname(prefix) or "."
        nearby = sorted(p.name[:-4] for p in Path(folder).glob("*.idx"))[:5] if os.path.isdir(folder) else []
        hint = f" (datasets in {folder}: {', '.join(nearby)})" if nearby else ""
        raise DataError(f"no dataset {prefix}: {' and '.join(missing)} not found{hint}; make it with tools/preprocess_data.py")
    return prefix


def ends_digest(path: str) -> str:
    """Return a digest of the size, the beginning and the end of a .bin, which identifies it without reading all of it."""
    size = os.path.getsize(path)
    digest = hashlib.sha256(str(size).encode())
    with open_regular(path) as file:
        digest.update(file.read(DIGEST_BYTES))
        file.seek(max(0, size - DIGEST_BYTES))
        digest.update(file.read(DIGEST_BYTES))
    return digest.hexdigest()


def file_stamp(path: str) -> tuple[int, int, int]:
    """Return inode, size and modification time of a file; one of them changes when it is replaced or written to."""
    status = os.stat(path)
    return status.st_ino, status.st_size, status.st_mtime_ns


def read_sidecar(prefix: str) -> dict[str, Any]:
    """Return the entries of the sidecar `PREFIX.meta.json`, empty if there is none; DataError if it is not a JSON object."""
    path = prefix + ".meta.json"
    if not os.path.lexists(path):
        return {}
    try:
        meta = read_json(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error_reason(error)}); delete it to go on without it") from error
    if not isinstance(meta, dict):
        raise DataError(f"{path}: not a JSON object; delete it to go on without it")
    return meta


class IndexedDataset:
    """A memory-mapped dataset on disk: `dataset[i]` is sequence i, int array `[tokens]`.

    Attributes:
        lengths: int32 `[n]`, number of tokens of each sequence.
        offsets: int64 `[n]`, byte offset of each sequence in the .bin.
        documents: int64 `[m]`, the sequence at which each document starts, and the number of sequences.
        tokens: int `[tokens]`, the tokens of all sequences.

    Raises:
        DataError: the files are missing, truncated, of another format or inconsistent.
    """

    def __init__(self, prefix: str) -> None:
        self.prefix = check_prefix(prefix)
        self.idx_path, self.bin_path = self.prefix + ".idx", self.prefix + ".bin"
        try:
            check_regular(self.bin_path)
            self.stamp = file_stamp(self.bin_path)
            self._open()
            self._check_sidecar()
        except (OSError, MemoryError) as error:
            raise DataError(
                f"cannot read dataset {getattr(error, 'filename', None) or self.prefix}: {error_reason(error)}"
            ) from error

    def _open(self) -> None:
        """Map the index and the tokens into memory, and check every number of the index."""
        size = check_regular(self.idx_path)
        self.dtype, n, m = self._read_header(size)
        # A memory map keeps its file open, so small indices are read instead: a blend may have thousands of them.
        index = (
            np.memmap(self.idx_path, mode="r", dtype=np.uint8)
            if size > MMAP_MIN_BYTES
            else np.fromfile(self.idx_path, dtype=np.uint8)
        )
        if len(index) != size:
            raise self._invalid_index("it is being written to")
        bounds = np.cumsum([HEADER.size, 4 * n, 8 * n, 8 * m])
        self.lengths: NDArray[np.int32] = index[bounds[0] : bounds[1]].view("<i4")
        self.offsets: NDArray[np.int64] = index[bounds[1] : bounds[2]].view("<i8")
        self.documents: NDArray[np.int64] = index[bounds[2] : bounds[3]].view("<i8")
        count = self._checked_bytes() // self.dtype.itemsize
        self._check_documents()
        self.tokens: NDArray[Any] = (
            np.memmap(self.bin_path, mode="r", dtype=self.dtype, shape=(count,)) if count else np.empty(0, self.dtype)
        )

    def _read_header(self, size: int) -> tuple[np.dtype[Any], int, int]:
        """Return the tokens' dtype, the number of sequences and that of document bounds, from an index of `size` bytes."""
        with open_regular(self.idx_path) as file:
            head = file.read(HEADER.size)
        if head.startswith(LEGACY_MAGIC):
            raise self._invalid_index("it has the old lazy/cached format; preprocess the text again")
        if pointer := next(filter(is_lfs_pointer, (self.idx_path, self.bin_path)), None):
            raise DataError(f"{pointer}: it is {LFS_POINTER}")
        if not head.startswith(MAGIC):
            raise self._invalid_index("not an index of an indexed dataset (wrong first bytes)")
        if len(head) < HEADER.size:
            raise self._invalid_index(f"truncated: {size} bytes, the header alone has {HEADER.size}")
        _, version, code, n, m = HEADER.unpack(head)
        if version != 1:
            raise self._invalid_index(f"version {version}, only version 1 is known")
        if code not in DTYPE_CODES:
            raise self._invalid_index(f"token format code {code} is none of {', '.join(map(str, DTYPE_CODES))} (whole numbers)")
        expected = HEADER.size + 12 * n + 8 * m
        if size not in (expected, expected + n):  # + n: one byte per sequence, the mode, which multimodal datasets append
            problem = "truncated" if size < expected else "too long"
            raise self._invalid_index(
                f"{problem}: {size} bytes, its header ({n} sequences, {m - 1} documents) needs {expected}"
            )
        return DTYPE_CODES[code], n, m

    def _checked_bytes(self) -> int:
        """Return the bytes of the .bin; DataError unless the sequences fill it exactly, so that reads stay in bounds."""
        size, n = os.path.getsize(self.bin_path), len(self.lengths)
        if n and int(self.lengths.min()) < 0:
            raise self._invalid_index(f"sequence {int(self.lengths.argmin())} has a negative length")
        end = 0
        for start in range(0, n, COPY_CHUNK):  # in chunks, to bound the memory of the comparison
            offsets = self.offsets[start : start + COPY_CHUNK]
            ends = offsets + self.lengths[start : start + COPY_CHUNK].astype(np.int64) * self.dtype.itemsize
            misplaced = offsets != np.concatenate(([end], ends[:-1]))
            if misplaced.any():
                raise self._invalid_index(
                    f"sequence {start + int(misplaced.argmax())} does not begin where the one before it ends"
                )
            end = int(ends[-1])
        if end != size:
            problem = "truncated" if size < end else "not the file of its index"
            raise DataError(f"{self.bin_path}: {problem}: {size} bytes, {self.idx_path} needs {end}; make the dataset again")
        return end

    def _check_documents(self) -> None:
        """Raise a DataError unless the documents follow one another from the first sequence to the last."""
        n = len(self.lengths)
        if not len(self.documents) or int(self.documents[0]) != 0 or int(self.documents[-1]) != n:
            raise self._invalid_index(f"its documents do not run from sequence 0 to {n}")
        if bool((np.diff(self.documents) < 0).any()):
            raise self._invalid_index("its documents are not in order")

    def _check_sidecar(self) -> None:
        """Raise a DataError if the sidecar does not match the .idx or the .bin: one of the three files was replaced."""
        meta = self.meta()
        actual = dict(dtype=self.dtype.name, documents=self.document_count, sequences=len(self), tokens=self.token_count)
        for name, value in actual.items():
            if meta.get(name, value) != value:
                raise DataError(
                    f"{self.prefix}.meta.json: it is of a dataset with {name} {meta[name]!r}, {self.idx_path} has {value}; "
                    "restore the files that belong together, or delete it if .bin and .idx do"
                )
        if (ends := meta.get("bin_ends_sha256")) is not None and ends != ends_digest(self.bin_path):
            raise DataError(
                f"{self.bin_path}: it has other tokens than the file that {self.prefix}.meta.json was written with; "
                f"restore the files that belong together, or delete {self.prefix}.meta.json if .bin and .idx do"
            )

    def check_unchanged(self) -> None:
        """Raise a DataError if the .bin was replaced or written to after it was opened and checked."""
        try:
            same = file_stamp(self.bin_path) == self.stamp
        except OSError as error:
            raise DataError(f"{self.bin_path}: it disappeared while it was being read: {error.strerror}") from error
        if not same:
            raise DataError(f"{self.bin_path}: it was changed or replaced while it was being read; start again to read it anew")

    def _invalid_index(self, problem: str) -> DataError:
        return DataError(f"{self.idx_path}: {problem}")

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, number: int) -> NDArray[Any]:
        return self.get(number)

    def get(self, number: int, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Return tokens of one sequence, `[stop - start]`, as a view of the memory map.

        Args:
            number: number of the sequence.
            start: first token.
            stop: token after the last one; None or a larger number than the length stands for the end.
        """
        first = int(self.offsets[number]) // self.dtype.itemsize
        length = int(self.lengths[number])
        return self.tokens[first + start : first + (length if stop is None else min(stop, length))]

    @property
    def document_count(self) -> int:
        """The number of documents."""
        return len(self.documents) - 1

    @property
    def token_count(self) -> int:
        """The number of tokens of all sequences."""
        return len(self.tokens)

    def meta(self) -> dict[str, Any]:
        """Return the entries of the sidecar, empty if there is none."""
        return read_sidecar(self.prefix)


class IndexedWriter:
    """Writes a dataset under temporary names. `finish` renames the files; without it they are removed on exit.

    with IndexedWriter(prefix, token_dtype(tokenizer.vocab_size)) as writer:
        writer.add_document(tokens, [len(tokens)])
        writer.finish(meta)
    """

    def __init__(self, prefix: str, dtype: np.dtype[Any]) -> None:
        self.prefix, self.dtype = prefix, np.dtype(dtype)
        self.lengths, self.documents = array("i"), array("q", [0])
        self.token_count = 0
        self._limits = np.iinfo(self.dtype)
        try:
            os.makedirs(os.path.dirname(prefix) or ".", exist_ok=True)
            for end in DATASET_SUFFIXES:  # files of a killed run
                remove_leftovers(Path(prefix + end))
            self._bin = PendingFile(prefix + ".bin")
        except OSError as error:
            raise DataError(f"cannot write {prefix}.bin: {error}") from error

    def add_document(self, tokens: NDArray[Any], lengths: list[int] | NDArray[Any]) -> None:
        """Append one document. tokens: int `[n]`. lengths: tokens of each of its sequences; `[]` if it has none."""
        self.add_documents(tokens, lengths, [len(lengths)])

    def add_documents(
        self, tokens: NDArray[Any], lengths: list[int] | NDArray[Any], sequences: list[int] | NDArray[Any]
    ) -> None:
        """Append several documents.

        Args:
            tokens: int `[n]`, of all documents.
            lengths: int `[sequences]`, tokens of each sequence.
            sequences: int `[documents]`, number of sequences of each document.

        Raises:
            DataError: if an id does not fit the number format, or a sequence is too long for the file format.
        """
        if len(tokens) and not (self._limits.min <= int(tokens.min()) and int(tokens.max()) <= self._limits.max):
            raise DataError(
                f"{self.prefix}: a token id is outside of {self.dtype.name}: {int(tokens.min())} to {int(tokens.max())}"
            )
        sizes = np.asarray(lengths, dtype=np.int64)
        counts = np.asarray(sequences, dtype=np.int64)
        if int(sizes.sum()) != len(tokens) or int(counts.sum()) != len(sizes):
            raise ValueError("lengths must add up to the tokens, and sequences to the lengths")
        if len(sizes) and int(sizes.max()) > np.iinfo(np.int32).max:
            raise DataError(
                f"{self.prefix}: a document has {int(sizes.max())} tokens; the format allows {np.iinfo(np.int32).max}"
            )
        self._bin.file.write(np.ascontiguousarray(tokens, dtype=self.dtype).data)
        # The entry of a document is the sequence after its last one, at which the next document starts.
        self.documents.frombytes((len(self.lengths) + np.cumsum(counts)).astype(np.int64).tobytes())
        self.lengths.frombytes(sizes.astype(np.int32).tobytes())
        self.token_count += len(tokens)

    def add_dataset(self, dataset: IndexedDataset) -> None:
        """Append all documents of another dataset of the same number format."""
        if dataset.dtype != self.dtype:
            raise DataError(
                f"{dataset.prefix} holds {dataset.dtype.name} tokens, {self.prefix} {self.dtype.name}: not the same vocabulary"
            )
        for start in range(0, dataset.token_count, COPY_CHUNK):
            self._bin.file.write(np.ascontiguousarray(dataset.tokens[start : start + COPY_CHUNK]).data)
        self.documents.frombytes((len(self.lengths) + dataset.documents[1:]).astype(np.int64).tobytes())
        self.lengths.frombytes(np.asarray(dataset.lengths, dtype=np.int32).tobytes())
        self.token_count += dataset.token_count

    def finish(self, meta: Mapping[str, Any] | None = None) -> None:
        """Write index and sidecar, then rename all files into place; DataError if writing fails.

        meta: entries of the sidecar; None writes no sidecar.
        """
        with contextlib.ExitStack() as stack:
            try:
                self._bin.close()
                pending = {".bin": self._bin}
                if meta is not None:
                    counts = dict(
                        dtype=self.dtype.name,
                        documents=len(self.documents) - 1,
                        sequences=len(self.lengths),
                        tokens=self.token_count,
                        bin_ends_sha256=ends_digest(str(self._bin.temporary)),
                    )
                    pending[".meta.json"] = stack.enter_context(PendingFile(self.prefix + ".meta.json"))
                    pending[".meta.json"].file.write((json.dumps({**meta, **counts}, indent=1) + "\n").encode())
                pending[".idx"] = stack.enter_context(PendingFile(self.prefix + ".idx"))
                self._write_index(pending[".idx"].file)
                for file in pending.values():
                    file.close()
                # Delete the old index first: if the process dies here, no index is left beside a .bin of another dataset.
                for end in (".idx", ".meta.json"):
                    Path(self.prefix + end).unlink(missing_ok=True)
                for file in pending.values():
                    file.commit()
            except OSError as error:
                self.abort()
                raise DataError(f"cannot write dataset {self.prefix}: {error}") from error

    def _write_index(self, file: Any) -> None:
        """Write the .idx, in the format that the module's docstring describes."""
        code = next(code for code, dtype in DTYPE_CODES.items() if dtype == self.dtype)
        lengths = np.frombuffer(self.lengths, dtype=np.int32)
        file.write(HEADER.pack(MAGIC, 1, code, len(lengths), len(self.documents)))
        file.write(lengths.astype("<i4", copy=False).data)
        start = 0
        for first in range(0, len(lengths), COPY_CHUNK):
            block = lengths[first : first + COPY_CHUNK].astype(np.int64) * self.dtype.itemsize
            ends = start + np.cumsum(block)
            file.write((ends - block).astype("<i8", copy=False).data)
            start = int(ends[-1])
        file.write(np.frombuffer(self.documents, dtype=np.int64).astype("<i8", copy=False).data)

    def abort(self) -> None:
        """Remove the files written so far."""
        self._bin.discard()

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.abort()
