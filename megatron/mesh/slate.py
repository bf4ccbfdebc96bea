"""What a process does, in a few bytes that outlive it: its peers on the same host read them when it has died. Pure."""

from __future__ import annotations

import mmap
import os
import tempfile
from contextlib import suppress
from pathlib import Path

from megatron.config.regular_file import read_bytes
from megatron.mesh.beats import Process

SIZE = 256  # bytes; longer words are cut


class Slate:
    """A process writes, which costs a microsecond: the bytes are memory. Where no file can be made, nobody will read them."""

    def __init__(self, process: Process) -> None:
        self._path = _path(process)
        self._room: mmap.mmap | bytearray = bytearray(SIZE)
        with suppress(OSError):
            descriptor = os.open(self._path, os.O_CREAT | os.O_RDWR | os.O_TRUNC, 0o600)
            try:
                os.ftruncate(descriptor, SIZE)
                self._room = mmap.mmap(descriptor, SIZE)
            finally:
                os.close(descriptor)

    def write(self, text: str) -> None:
        """Replace what was there."""
        data = text.encode(errors="replace")[: SIZE - 1] + b"\0"
        self._room[: len(data)] = data

    def wipe(self) -> None:
        """Leave nothing behind."""
        self._path.unlink(missing_ok=True)


def left_by(process: Process, seen_from: Process) -> str | None:
    """What a process of the same host wrote last, also when it has died. None from elsewhere, and where nothing is."""
    if not process.space or process.space != seen_from.space:
        return None
    try:
        data = read_bytes(_path(process), SIZE)
    except OSError:
        return None
    return data.split(b"\0", 1)[0].decode(errors="replace") or None


def forget(process: Process) -> None:
    """Remove what a process left that could not do so itself."""
    _path(process).unlink(missing_ok=True)


def _path(process: Process) -> Path:
    return Path(tempfile.gettempdir()) / f"megatron-{process.pid}-{process.started}"
