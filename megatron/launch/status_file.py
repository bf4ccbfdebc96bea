"""Write the current phase of a process to a small file, which other ranks on the host read after it has died.

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
LEFTOVER_SECONDS = 600.0  # time from the discovery that a process is dead to the removal of its file


class StatusFile:
    """The current phase of a process, in a small memory-mapped file, so that writing takes about a microsecond.

    If the file cannot be created, the text is written to memory that nobody reads. The directory of the files is private to the
    user. Creating a file also removes those of processes that have been dead for LEFTOVER_SECONDS.
    """

    def __init__(self, process: Process) -> None:
        self._process = process
        self._buffer: mmap.mmap | bytearray = bytearray(SIZE)
        if not process.space:  # no other process could find the file
            return
        with suppress(OSError), PrivateDirectory() as directory:
            remove_leftovers(directory, process)
            descriptor = directory.create(_name(process))
            try:
                # Write zeros instead of only setting the size: on a full disk a later access to the page is fatal.
                if os.write(descriptor, bytes(SIZE)) == SIZE:
                    self._buffer = mmap.mmap(descriptor, SIZE)
            finally:
                os.close(descriptor)

    def write(self, text: str) -> None:
        """Replace the text."""
        # A null byte ends the text, since bytes of an earlier, longer text may follow.
        data = text.encode(errors="replace")[: SIZE - 1] + b"\0"
        self._buffer[: len(data)] = data

    def wipe(self) -> None:
        """Remove the file."""
        remove_status(self._process)


def read_status(process: Process, seen_from: Process) -> str | None:
    """Return the last text of a process, alive or dead; None if it is on another host than `seen_from`, or has no file."""
    if not process.space or process.space != seen_from.space:
        return None
    try:
        with PrivateDirectory() as directory:
            data = directory.read(_name(process), SIZE)
    except OSError:
        return None
    return data.split(b"\0", 1)[0].decode(errors="replace") or None


def remove_status(process: Process) -> None:
    """Remove the file of a process."""
    with suppress(OSError), PrivateDirectory() as directory:
        directory.remove(_name(process))


def remove_leftovers(directory: PrivateDirectory, own: Process) -> None:
    """Remove the files of dead processes of this host, boot and namespace, LEFTOVER_SECONDS after they were found dead.

    Not at once, since another job of this user may be about to read the file of a rank that was just killed.
    """
    pattern = re.compile(re.escape(_name(own).rsplit("-", 2)[0]) + r"-(\d+)-(\d+)")
    for match in filter(None, map(pattern.fullmatch, directory.names())):
        is_dead = Process(own.host, own.space, int(match[1]), int(match[2])).state(own) == "gone"
        with suppress(FileNotFoundError):  # another process has removed it
            if is_dead and directory.seconds_left_over(match[0]) > LEFTOVER_SECONDS:
                directory.remove(match[0])


def _name(process: Process) -> str:
    """Return the name of a process's file: a digest of host, boot and namespace, then process id and start time."""
    machine = sha256(f"{process.host} {process.space}".encode()).hexdigest()[:12]
    return f"slate-{machine}-{process.pid}-{process.started}"
