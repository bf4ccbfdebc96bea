"""Decompress text files while they are read. The kind of compression is detected from a file's first bytes, not its name.

gzip, zstandard, bzip2 and xz are decompressed in bounded memory. Files that `recognize_bytes` recognizes as something other
than text are rejected.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import IO, Any, cast

from megatron.data.errors import DataError
from megatron.files.foreign import COMPRESSION_SIGNATURES, HEAD_BYTES, detect_compression, recognize_bytes
from megatron.launch.packages import install_command

BLOCK_BYTES = 1 << 20  # size of a block of lines, and of the buffers of decompressed data
PACKED_BYTES = 1 << 10  # compressed bytes that are processed at once; 4 bytes of zstandard can expand to 128 KB
MAX_XZ_BYTES = 1 << 28  # memory limit of the xz decompressor; `xz -9` needs 65 MB
MAX_PACKINGS = 3  # one more than the levels of nested compression that are allowed
DAMAGE_ERRORS = (OSError, EOFError, zlib.error)  # raised by reading a damaged file

# Kind of compression by file name suffix.
PACKED_SUFFIXES: Mapping[str, str] = MappingProxyType(
    {".gz": "gzip", ".zst": "zstandard", ".bz2": "bzip2", ".xz": "xz", ".lzma": "lzma"}
)


class UnpackedFile(io.RawIOBase):
    """The decompressed bytes of a file that consists of one or several compressed streams.

    Reading raises EOFError if the last stream is truncated, and OSError for invalid bytes. The decompressors of bz2, lzma and
    zstandard are used directly, since the file objects of these packages do not detect a truncated stream or do not bound the
    memory.
    """

    def __init__(self, file: IO[bytes], new_stream: Callable[[], Any], errors: tuple[type[Exception], ...]) -> None:
        self._file, self._new_stream, self._errors = file, new_stream, errors
        self._stream: Any = None
        self._packed, self._ready = b"", b""

    def readable(self) -> bool:
        """Return True, as Python's `io` requires."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` with decompressed bytes; return their number, 0 at the end."""
        while not self._ready:
            # A decompressor with bounded output may have more output ready, and then needs no input.
            has_output = self._stream is not None and not getattr(self._stream, "needs_input", True)
            if not has_output and not self._packed:
                self._packed = self._file.read(PACKED_BYTES)
                if not self._packed:
                    if self._stream is not None:
                        raise EOFError("the file ends within compressed data: it was cut off")
                    return 0
            self._unpack()
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    def _unpack(self) -> None:
        """Decompress what was read, up to the end of the stream; bytes after it begin the next stream."""
        if self._stream is None:
            self._packed = self._packed.lstrip(b"\x00")  # xz allows zero bytes between streams
            if not self._packed:
                return
            self._stream = self._new_stream()
        bounded = (BLOCK_BYTES,) if hasattr(self._stream, "needs_input") else ()
        try:
            self._ready = self._stream.decompress(self._packed, *bounded)
        except self._errors as error:
            raise OSError(str(error)) from error
        self._packed = b""
        if self._stream.eof:
            self._packed, self._stream = self._stream.unused_data, None

    def close(self) -> None:
        """Close the compressed file, too."""
        self._file.close()
        super().close()


class _PrependedFile(io.RawIOBase):
    """The bytes that were already read from a file, followed by the rest of the file; a pipe cannot be rewound."""

    def __init__(self, head: bytes, rest: Any) -> None:
        self._head, self._rest = head, rest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._head[: len(buffer)] or self._rest.read1(len(buffer))
        self._head = self._head[len(buffer) :]
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._rest.close()
        super().close()


def open_unpacked(name: str, file: IO[bytes]) -> IO[bytes]:
    """Return a file with the decompressed bytes of an open file, or its bytes if it is not compressed; closing it closes both.

    Args:
        name: the file's name, for messages; its suffix tells whether a very short file is a truncated compressed one.
        file: the open file, at its beginning; may be a pipe.

    Raises:
        DataError: the file is not text, is truncated within its first bytes, or is compressed too many times over.
    """
    for _ in range(MAX_PACKINGS):
        head, file = _peek(name, file)
        kind = detect_compression(head)
        if kind is None:
            if (found := recognize_bytes(head, name)) is not None:
                raise DataError(f"{name}: it is {found}")
            _check_truncated(name, head)
            return file
        file = _unpack(kind, name, file)
    raise DataError(f"{name}: it is compressed more than {MAX_PACKINGS - 1} times over; unpack it")


def _peek(name: str, file: IO[bytes]) -> tuple[bytes, IO[bytes]]:
    """Return the first bytes of a file, and a file with all its bytes, these included."""
    head = b""
    try:
        while len(head) < HEAD_BYTES and (more := file.read(HEAD_BYTES - len(head))):
            head += more
    except DAMAGE_ERRORS as error:
        raise damaged_error(name, 0, error) from error
    return head, io.BufferedReader(_PrependedFile(head, file), BLOCK_BYTES)


def _check_truncated(name: str, head: bytes) -> None:
    """Raise a DataError if a file has the suffix of a kind of compression, but ends within that kind's magic bytes."""
    kind = next((kind for suffix, kind in PACKED_SUFFIXES.items() if name.endswith(suffix)), None)
    if kind and any(magic.startswith(head) for magic, known in COMPRESSION_SIGNATURES if known == kind):
        raise damaged_error(name, 0, f"of {kind} it has only {len(head)} bytes: it was cut off")


def _unpack(kind: str, name: str, file: IO[bytes]) -> IO[bytes]:
    """Return a file with the decompressed bytes of a file. kind: one of the values of `PACKED_SUFFIXES`."""
    match kind:
        case "gzip":
            plain: Any = gzip.GzipFile(fileobj=file, mode="rb")
            plain.myfileobj = file  # GzipFile.close() closes this file
            return cast(IO[bytes], plain)
        case "bzip2":
            raw = UnpackedFile(file, bz2.BZ2Decompressor, (OSError, ValueError))
        case "zstandard":
            raw = _zstandard(name, file)
        case _:
            limit = MAX_XZ_BYTES
            raw = UnpackedFile(file, lambda: lzma.LZMADecompressor(memlimit=limit), (lzma.LZMAError,))
    return io.BufferedReader(raw, BLOCK_BYTES)


def _zstandard(name: str, file: IO[bytes]) -> UnpackedFile:
    """Return a zstandard file's decompressed bytes; DataError if the package is not installed."""
    try:
        import zstandard
    except ImportError as error:
        raise DataError(
            f"{name}: reading zstandard needs its package ({install_command('zstandard')}), or unpack it"
        ) from error
    return UnpackedFile(file, zstandard.ZstdDecompressor().decompressobj, (zstandard.ZstdError,))


def damaged_error(name: str, line: int, why: object) -> DataError:
    """Return the error for a damaged file.

    Args:
        name: the file's name.
        line: number of the last line that was read, from 1.
        why: the reason, an exception or text.
    """
    return DataError(f"{name}: damaged after line {line} ({why}); get the file again")


def bare_name(name: str) -> str:
    """Return a file name without a suffix of compression."""
    return next((name.removesuffix(suffix) for suffix in PACKED_SUFFIXES if name.endswith(suffix)), name)
