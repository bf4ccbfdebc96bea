"""The bytes of a text file as they were before it was packed, whatever its name ends in: its first bytes say what it is.

gzip, zstandard, bzip2 and xz are unpacked while they are read, in bounded memory; an archive, a table or a text in another
encoding is refused under its own name, with what to do.
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
from megatron.packages import how_to_install

BLOCK_BYTES = 1 << 20
PACKED_BYTES = 1 << 10  # unpacked at once; 4 bytes of zstandard can stand for 128 KB
HEAD_BYTES = 512  # of a file that tell its kind; tar's mark stands at byte 257
MAX_XZ_BYTES = 1 << 28  # of memory for one; `xz -9` takes 65 MB
MAX_PACKINGS = 3  # one in another

# The kind of a packed file, by the suffix of its name.
SUFFIXES: Mapping[str, str] = MappingProxyType(
    {".gz": "gzip", ".zst": "zstandard", ".bz2": "bzip2", ".xz": "xz", ".lzma": "lzma"}
)
PACKED = (
    ("gzip", b"\x1f\x8b"),
    ("zstandard", b"\x28\xb5\x2f\xfd"),
    *(("zstandard", bytes([n]) + b"\x2a\x4d\x18") for n in range(0x50, 0x60)),  # a frame that is to be skipped
    *(("bzip2", b"BZh%d" % level + begin) for level in range(1, 10) for begin in (b"1AY&SY", b"\x17rE8P\x90")),
    ("xz", b"\xfd7zXZ\x00"),
    ("lzma", b"\x5d\x00\x00"),
)
LINES = 'write one JSON object a line, such as {"text": "..."}'
TABLE = f"{LINES}: `python -c \"import pandas; pandas.read_%s('FILE').to_json('FILE.jsonl', orient='records', lines=True)\"`"
UNPACK = "unpack it and name the files in it"
ENCODING = "convert it: `iconv -f %s -t UTF-8 FILE > NEW`"
# What has these bytes at this place is no text in UTF-8: its name, and what to do. A mark of letters alone could begin a text,
# and counts beside bytes that no text has.
OTHERS = (
    (0, b"PAR1", "a Parquet file", TABLE % "parquet"),
    (0, b"ARROW1", "an Arrow file", TABLE % "feather"),
    (0, b"\xff\xff\xff\xff", "an Arrow stream, as the package datasets keeps them", f"{LINES}: its `Dataset.to_json`"),
    (0, b"ORC", "an ORC file", TABLE % "orc"),
    (0, b"Obj\x01", "an Avro file", LINES),
    (0, b"\x89HDF", "an HDF5 file", LINES),
    (0, b"SQLite format 3\x00", "an SQLite database", LINES),
    (0, b"%PDF-", "a PDF", LINES),
    (0, b"MMIDIDX\x00", "the index of an indexed dataset, which was preprocessed already", "name its prefix as --data-path"),
    (0, b"PK\x03\x04", "a zip archive", UNPACK),
    (0, b"PK\x05\x06", "an empty zip archive", UNPACK),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", UNPACK),
    (0, b"Rar!\x1a\x07", "a RAR archive", UNPACK),
    (257, b"ustar", "a tar archive", UNPACK),
    (0, b"\x04\x22\x4d\x18", "packed by LZ4", "unpack it: `lz4 -d FILE`"),
    (0, b"\xff\x06\x00\x00sNaPpY", "packed by Snappy", "unpack it"),
    (0, b"\x1f\x9d", "packed by compress", "unpack it: `gzip -d FILE`"),
    (0, b"LZIP", "packed by lzip", "unpack it: `lzip -d FILE`"),
    (0, b"version https://git-lfs.github.com/", "a pointer of Git LFS, not the file itself", "fetch it: `git lfs pull`"),
    (0, b"\xff\xfe\x00\x00", "text in UTF-32, not UTF-8", ENCODING % "UTF-32"),
    (0, b"\x00\x00\xfe\xff", "text in UTF-32, not UTF-8", ENCODING % "UTF-32"),
    (0, b"\xff\xfe", "text in UTF-16, not UTF-8", ENCODING % "UTF-16"),
    (0, b"\xfe\xff", "text in UTF-16, not UTF-8", ENCODING % "UTF-16"),
)


class UnpackedFile(io.RawIOBase):
    """The unpacked bytes of a file of any number of streams, one after the other. EOFError if the last one is cut off.

    A stream is a decompressor of bz2, lzma or zstandard: the packages' own files end without a word where one is cut off, or
    bound no memory. OSError for bytes that are none.
    """

    def __init__(self, file: IO[bytes], new_stream: Callable[[], Any], errors: tuple[type[Exception], ...]) -> None:
        self._file, self._new_stream, self._errors = file, new_stream, errors
        self._stream: Any = None
        self._packed, self._ready = b"", b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            waits = self._stream is not None and not getattr(self._stream, "needs_input", True)
            if not waits and not self._packed:
                self._packed = self._file.read(PACKED_BYTES)
                if not self._packed:
                    if self._stream is not None:
                        raise EOFError("the file ends within packed data: it was cut off")
                    return 0
            self._unpack()
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    def _unpack(self) -> None:
        if self._stream is None:
            self._packed = self._packed.lstrip(b"\x00")  # xz allows for zeros between streams
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
        self._file.close()
        super().close()


class _Rejoined(io.RawIOBase):
    """Bytes that were read from a file, and then the rest of it: a pipe cannot be wound back."""

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


def unpacked(name: str, file: IO[bytes]) -> IO[bytes]:
    """Return the unpacked bytes of an open file; it is closed with them.

    Args:
        name: of the file, for messages, and for its suffix where the file is too short to tell its kind.
        file: at its beginning; may be a pipe.

    Raises:
        DataError: for a file that is no text, under the name of what it is; for one that is cut off in its first bytes.
    """
    for _ in range(MAX_PACKINGS):
        head, file = _look(name, file)
        _refuse_others(name, head)
        kind = next((kind for kind, magic in PACKED if head.startswith(magic)), None)
        if kind is None:
            _refuse_cut_off(name, head)
            return file
        file = _unpack(kind, name, file)
    raise DataError(f"{name}: packed more than {MAX_PACKINGS - 1} times; unpack it")


def _look(name: str, file: IO[bytes]) -> tuple[bytes, IO[bytes]]:
    """The first bytes of a file, and a file that still has them."""
    head = b""
    try:
        while len(head) < HEAD_BYTES and (more := file.read(HEAD_BYTES - len(head))):
            head += more
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{name}: damaged after line 0 ({error})") from error
    return head, io.BufferedReader(_Rejoined(head, file), BLOCK_BYTES)


def _refuse_others(name: str, head: bytes) -> None:
    binary = any(byte < 9 for byte in head)
    for place, magic, what, advice in OTHERS:
        if head[place:].startswith(magic) and (binary or not magic.isalnum()):
            raise DataError(f"{name}: {what}; {advice.replace('FILE', name)}")
    # Two Latin characters in UTF-16 without a mark at its beginning; as UTF-8 they are text as well, with zeros.
    zeros = [byte == 0 for byte in head[:4]]
    if zeros in ([False, True, False, True], [True, False, True, False]):
        advice = ENCODING % ("UTF-16BE" if zeros[0] else "UTF-16LE")
        raise DataError(f"{name}: text in UTF-16, not UTF-8; {advice.replace('FILE', name)}")


def _refuse_cut_off(name: str, head: bytes) -> None:
    """DataError for a packed file, by its name, that ends before its kind can be told."""
    kind = next((kind for suffix, kind in SUFFIXES.items() if name.endswith(suffix)), None)
    if kind and any(magic.startswith(head) for known, magic in PACKED if known == kind):
        raise DataError(f"{name}: damaged after line 0 (of {kind} it has only {len(head)} bytes: it was cut off)")


def _unpack(kind: str, name: str, file: IO[bytes]) -> IO[bytes]:
    match kind:
        case "gzip":
            plain: Any = gzip.GzipFile(fileobj=file, mode="rb")
            plain.myfileobj = file  # closed with it
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
    try:
        import zstandard
    except ImportError as error:
        raise DataError(f"{name}: reading zstandard needs its package ({how_to_install('zstandard')}), or unpack it") from error
    return UnpackedFile(file, zstandard.ZstdDecompressor().decompressobj, (zstandard.ZstdError,))


def bare_name(name: str) -> str:
    """Return a file's name without the suffix of its packing."""
    return next((name.removesuffix(suffix) for suffix in SUFFIXES if name.endswith(suffix)), name)
