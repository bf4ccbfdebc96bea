"""Keep the current phase of a process in a small file, which other ranks on the host read when it has died.

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

SIZE = 256  # bytes of the file; a longer text is truncated
KEPT = 600.0  # seconds that the file of a dead process is kept after another process has noticed it


class StatusFile:
    """The current phase of a process, in a small memory-mapped file, so that writing costs a microsecond.

    If no file can be created, the text is kept in plain memory, which nobody reads. The directory of the files belongs to this
    user alone. Creating a file removes those of processes that have long been dead.
    """

    def __init__(self, process: Process) -> None:
        self._process = process
        self._room: mmap.mmap | bytearray = bytearray(SIZE)
        if not process.space:  # no other process could find the file
            return
        with suppress(OSError), PrivateDirectory() as directory:
            remove_dead(directory, process)
            descriptor = directory.create(_name(process))
            try:
                # The bytes are written, not only reserved: on a full disk a later access to the page would kill the process.
                if os.write(descriptor, bytes(SIZE)) == SIZE:
                    self._room = mmap.mmap(descriptor, SIZE)
            finally:
                os.close(descriptor)

    def write(self, text: str) -> None:
        """Replace the text."""
        # A null byte ends the text; the bytes after it belong to an earlier, longer text.
        data = text.encode(errors="replace")[: SIZE - 1] + b"\0"
        self._room[: len(data)] = data

    def wipe(self) -> None:
        """Remove the file."""
        remove_status(self._process)


def read_status(process: Process, seen_from: Process) -> str | None:
    """Return the last text of a process on the same host, alive or dead; None if it is on another host or has no file."""
    if not process.space or process.space != seen_from.space:
        return None
    try:
        with PrivateDirectory() as directory:
            data = directory.read(_name(process), SIZE)
    except OSError:
        return None
    return data.split(b"\0", 1)[0].decode(errors="replace") or None


def remove_status(process: Process) -> None:
    """Remove the file of a process that died before it could remove it."""
    with suppress(OSError), PrivateDirectory() as directory:
        directory.remove(_name(process))


def remove_dead(directory: PrivateDirectory, own: Process) -> None:
    """Remove the files of dead processes of this host, boot and process namespace, KEPT seconds after they were noticed.

    Not at once, since the ranks of another job of this user may be about to read the file of one that was just killed.
    """
    pattern = re.compile(re.escape(_name(own).rsplit("-", 2)[0]) + r"-(\d+)-(\d+)")
    for match in filter(None, map(pattern.fullmatch, directory.names())):
        gone = Process(own.host, own.space, int(match[1]), int(match[2])).state(own) == "gone"
        with suppress(FileNotFoundError):  # another process has removed it
            if gone and directory.seconds_left_over(match[0]) > KEPT:
                directory.remove(match[0])


def _name(process: Process) -> str:
    """Return the name of a process's file: a digest of host, boot and namespace, the process id, the start time."""
    where = sha256(f"{process.host} {process.space}".encode()).hexdigest()[:12]
    return f"slate-{where}-{process.pid}-{process.started}"
