"""Store small files in a private subdirectory of the temporary directory, which other users cannot read or replace."""

from __future__ import annotations

import os
import stat
import tempfile
import time
from contextlib import suppress

DIRECTORY_PREFIX = "megatron"


class PrivateDirectory:
    """A directory with mode 0700 for small files, shared by all processes of this user with the same `TMPDIR` on this host.

    Files are opened relative to the directory's descriptor, so that nobody can redirect them by replacing the directory.

    Raises:
        OSError: the directory cannot be created, or its path exists and is not a directory of this user alone.
    """

    def __init__(self) -> None:
        self.path = os.path.join(tempfile.gettempdir(), f"{DIRECTORY_PREFIX}-{os.geteuid()}")
        with suppress(FileExistsError):
            os.mkdir(self.path, 0o700)
        self._descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        status = os.fstat(self._descriptor)
        if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o077:
            self.close()
            raise PermissionError(f"{self.path}: not a directory of this user alone")

    def create(self, name: str) -> int:
        """Create a file, replacing an existing one, and return its descriptor for reading and writing."""
        self.remove(name)
        return os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600, dir_fd=self._descriptor)

    def read(self, name: str, limit: int) -> bytes:
        """Return the first `limit` bytes of a file."""
        descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=self._descriptor)
        try:
            return os.read(descriptor, limit)
        finally:
            os.close(descriptor)

    def seconds_left_over(self, name: str) -> float:
        """Mark the file of a dead process as left over; return the seconds since it was first marked.

        The mark is the missing write permission; the modification time is the time of marking.
        """
        status = os.stat(name, dir_fd=self._descriptor, follow_symlinks=False)
        if not status.st_mode & stat.S_IWUSR:
            return time.time() - status.st_mtime
        os.chmod(name, stat.S_IRUSR, dir_fd=self._descriptor)
        os.utime(name, dir_fd=self._descriptor)
        return 0.0

    def remove(self, name: str) -> None:
        """Delete a file if it exists."""
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self._descriptor)

    def names(self) -> list[str]:
        """Return the names of the files in the directory."""
        return os.listdir(self._descriptor)

    def close(self) -> None:
        """Close the directory's descriptor; the directory and its files remain."""
        os.close(self._descriptor)

    def __enter__(self) -> PrivateDirectory:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
