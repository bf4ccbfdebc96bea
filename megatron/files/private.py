"""Keep small files in a private directory below the machine's temporary directory, safe from other users."""

from __future__ import annotations

import os
import stat
import tempfile
import time
from contextlib import suppress

NAME = "megatron"


class PrivateDirectory:
    """Small files of this user, in a directory with mode 0700. OSError if it cannot be used.

    All processes of a user on a host with the same `TMPDIR` share the directory. If the path exists and is not a directory of
    this user alone, it is not used. Files are opened relative to the open directory, so that it cannot be replaced by another.
    """

    def __init__(self) -> None:
        self.path = os.path.join(tempfile.gettempdir(), f"{NAME}-{os.geteuid()}")
        with suppress(FileExistsError):
            os.mkdir(self.path, 0o700)
        self._directory = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        about = os.fstat(self._directory)
        if about.st_uid != os.geteuid() or stat.S_IMODE(about.st_mode) & 0o077:
            self.close()
            raise PermissionError(f"{self.path}: not a directory of this user alone")

    def create(self, name: str) -> int:
        """Open a new file for reading and writing; an existing one of this name is removed."""
        self.remove(name)
        return os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600, dir_fd=self._directory)

    def read(self, name: str, limit: int) -> bytes:
        """Return the first `limit` bytes of a file."""
        descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=self._directory)
        try:
            return os.read(descriptor, limit)
        finally:
            os.close(descriptor)

    def seconds_left_over(self, name: str) -> float:
        """Mark the file of a dead process as left over; return the seconds since it was first marked.

        A marked file has no write permission.
        """
        about = os.stat(name, dir_fd=self._directory, follow_symlinks=False)
        if not about.st_mode & stat.S_IWUSR:
            return time.time() - about.st_mtime
        os.chmod(name, stat.S_IRUSR, dir_fd=self._directory)
        os.utime(name, dir_fd=self._directory)
        return 0.0

    def remove(self, name: str) -> None:
        """Delete a file; no error when it is not there."""
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self._directory)

    def names(self) -> list[str]:
        """Return the names of its files."""
        return os.listdir(self._directory)

    def close(self) -> None:
        """Close the directory; its files stay."""
        os.close(self._directory)

    def __enter__(self) -> PrivateDirectory:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
