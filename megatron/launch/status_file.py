"""Keep what a process does in a few bytes that outlive it: its peers on the same host read them when it has died.

Imports no torch.
"""

from __future__ import annotations

import mmap
import os
import re
from contextlib import suppress
from hashlib import sha256

from megatron.files.private import PrivateDirectory
from megatron.launch.heartbeat import Process

SIZE = 256  # bytes; longer words are cut
KEPT = 600.0  # seconds that what a dead process left stays, from when a start noticed it


class StatusFile:
    """The current phase of a process, in a small file that is mapped into its memory, so that writing costs a microsecond.

    Where no file can be made, the bytes are plain memory, and nobody will read them. The files lie where only this user can
    write. What dead processes left there goes when a new one is made.
    """

    def __init__(self, process: Process) -> None:
        self._process = process
        self._room: mmap.mmap | bytearray = bytearray(SIZE)
        if not process.space:  # nobody could look it up
            return
        with suppress(OSError), PrivateDirectory() as directory:
            remove_dead(directory, process)
            descriptor = directory.create(_name(process))
            try:
                # Written and not only given a size: a page that a full disk has no room for would kill the process later.
                if os.write(descriptor, bytes(SIZE)) == SIZE:
                    self._room = mmap.mmap(descriptor, SIZE)
            finally:
                os.close(descriptor)

    def write(self, text: str) -> None:
        """Replace the text."""
        # A null byte ends the text; what stands behind it is of an earlier, longer one.
        data = text.encode(errors="replace")[: SIZE - 1] + b"\0"
        self._room[: len(data)] = data

    def wipe(self) -> None:
        """Remove the file."""
        remove_status(self._process)


def read_status(process: Process, seen_from: Process) -> str | None:
    """Return what a process of the same host wrote last, also when it has died.

    None for a process of another host, and where there is no such file.
    """
    if not process.space or process.space != seen_from.space:
        return None
    try:
        with PrivateDirectory() as directory:
            data = directory.read(_name(process), SIZE)
    except OSError:
        return None
    return data.split(b"\0", 1)[0].decode(errors="replace") or None


def remove_status(process: Process) -> None:
    """Remove the file of a process that could not do so itself."""
    with suppress(OSError), PrivateDirectory() as directory:
        directory.remove(_name(process))


def remove_dead(directory: PrivateDirectory, own: Process) -> None:
    """Remove what processes left that this one can see to be gone: those of its own host, boot and process namespace.

    Not at once: who watched a process that has just been killed, in another job of this user, is about to read it.
    """
    pattern = re.compile(re.escape(_name(own).rsplit("-", 2)[0]) + r"-(\d+)-(\d+)")
    for match in filter(None, map(pattern.fullmatch, directory.names())):
        gone = Process(own.host, own.space, int(match[1]), int(match[2])).state(own) == "gone"
        with suppress(FileNotFoundError):  # another start was faster
            if gone and directory.seconds_left_over(match[0]) > KEPT:
                directory.remove(match[0])


def _name(process: Process) -> str:
    """Return the name of a process's file: host, boot and namespace in one word, then number and start."""
    where = sha256(f"{process.host} {process.space}".encode()).hexdigest()[:12]
    return f"slate-{where}-{process.pid}-{process.started}"
