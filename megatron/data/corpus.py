"""Text as JSON lines: which files, their lines, and the text in a line."""

from __future__ import annotations

import glob
import gzip
import io
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any, cast

from megatron.data.errors import DataError
from megatron.files.regular import MAX_LINE_BYTES, open_regular, open_stream, parse_json
from megatron.packages import how_to_install

BLOCK_BYTES = 1 << 20
PACKED_BYTES = 1 << 10  # unpacked at once; 4 bytes of zstandard can stand for 128 KB


@dataclass(frozen=True)
class Line:
    """One line of a corpus, not yet parsed. number: from 1 on."""

    file: str
    number: int
    text: bytes


class BadLine(Exception):
    """A line that is no document; the message names file and line."""


def expand(patterns: Sequence[str]) -> list[str]:
    """The files that these names and globs stand for, each glob in sorted order; DataError for one without any."""
    files: list[str] = []
    for pattern in patterns:
        found = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
        if not found:
            raise DataError(f"--input {pattern}: no such file")
        for file in found:
            if os.path.isdir(file):
                raise DataError(f"--input {file}: a directory; name its files, as in {os.path.join(file, '*.jsonl')}")
        files += found
    return files


class ZstdFile(io.RawIOBase):
    """The unpacked bytes of a .zst file of any number of frames. EOFError if the last one is cut off.

    The package's own reader ends there without a word.
    """

    def __init__(self, path: str, file: IO[bytes]) -> None:
        try:
            import zstandard
        except ImportError as error:
            raise DataError(
                f"{path}: reading .zst needs the package zstandard ({how_to_install('zstandard')}), or unpack it"
            ) from error
        self._file = file
        self._new_frame, self._error = zstandard.ZstdDecompressor().decompressobj, zstandard.ZstdError
        self._frame: Any = None
        self._packed, self._ready = b"", b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            self._packed = self._packed or self._file.read(PACKED_BYTES)
            if not self._packed:
                if self._frame is not None:
                    raise EOFError("the file ends within a frame")
                return 0
            self._frame = self._frame or self._new_frame()
            try:
                self._ready = self._frame.decompress(self._packed)
            except self._error as error:
                raise OSError(str(error)) from error
            self._packed = b""
            if self._frame.eof:
                self._packed, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def open_text(file: str, *, pipes: bool = False) -> IO[bytes]:
    """The bytes of a file, unpacked if it ends in .gz or .zst. pipes: a pipe may stand for the file; it is read once."""
    try:
        packed = open_stream(file) if pipes else open_regular(file)
        if file.endswith(".gz"):
            unpacked: Any = gzip.GzipFile(fileobj=packed, mode="rb")
            unpacked.myfileobj = packed  # closed with it
            return cast(IO[bytes], unpacked)
        if file.endswith(".zst"):
            return io.BufferedReader(ZstdFile(file, packed), BLOCK_BYTES)
        return packed
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror or error}") from error


def blocks(files: Sequence[str], *, pipes: bool = False) -> Iterator[list[Line]]:
    """The lines of all files in order, without blank ones, in lists of about 1 MB. pipes: as `open_text`.

    DataError if a file is damaged, or a line longer than MAX_LINE_BYTES.
    """
    block: list[Line] = []
    size = 0
    for file in files:
        with open_text(file, pipes=pipes) as stream:
            number = 0
            while True:
                try:
                    text = stream.readline(MAX_LINE_BYTES + 1)
                except (OSError, EOFError, zlib.error) as error:
                    raise DataError(f"{file}: damaged after line {number} ({error})") from error
                if not text:
                    break
                number += 1
                if len(text) > MAX_LINE_BYTES:
                    most = f"{MAX_LINE_BYTES:,} bytes"
                    raise DataError(f"{file}:{number}: a line of more than {most}; cut it into several documents")
                if text.strip():
                    block.append(Line(file, number, text))
                    size += len(text)
                if size >= BLOCK_BYTES:
                    yield block
                    block, size = [], 0
    if block:
        yield block


def parse(line: Line, keys: Sequence[str], advice: str = "; choose with --json-keys") -> list[str]:
    """The texts under these keys of a line; BadLine if it is not a JSON object that has them all as valid text.

    advice: ends the message about a key that is not there.
    """
    where = f"{line.file}:{line.number}"
    try:
        document: Any = parse_json(line.text.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise BadLine(f"{where}: not UTF-8 ({error})") from error
    except ValueError as error:
        raise BadLine(
            f"{where}: not JSON ({error}); the input must be JSON lines, one object a line such as "
            f'{{"{keys[0]}": "..."}}, plain text is not accepted'
        ) from error
    if not isinstance(document, dict):
        raise BadLine(f"{where}: a JSON {type(document).__name__}, not an object with the key {keys[0]!r}")
    texts: list[str] = []
    for key in keys:
        text = document.get(key)
        if key not in document:
            have = ", ".join(map(repr, list(document)[:8])) or "none"
            raise BadLine(f"{where}: no key {key!r} (the keys are: {have}){advice}")
        if not isinstance(text, str):
            raise BadLine(f"{where}: the value of {key!r} is no text but {type(text).__name__}")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise BadLine(f"{where}: the text of {key!r} holds half of a surrogate pair ({error.reason})") from error
        texts.append(text)
    return texts
