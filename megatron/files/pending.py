"""Write files and directories atomically: they appear under their name complete, or not at all.

They are written under a temporary name in the same directory, `NAME.<pid>-<random>.tmp`, and renamed. The writer holds an flock
on the temporary file, which the kernel releases however the writer ends. So the next writer of the same name can remove the
left-overs of killed writers without touching files that are still being written. Without flock, left-overs stay.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import shutil
import stat
from contextlib import suppress
from pathlib import Path
from typing import IO

from megatron.files.outputs import MARKER, TEMPORARY, write_marker


class PendingFile:
    """A file under a temporary name: write to `file`, then call `commit`. Without `commit`, the file is removed.

    Attributes:
        path: the final path; an existing file stays there until `commit`.
        temporary: the temporary path.
        file: the file, opened for writing bytes.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        remove_leftovers(self.path)
        while True:
            self.temporary = self.path.with_name(self.path.name + _ending())
            # O_EXCL, so that an existing file or link of this name is not written to.
            descriptor = os.open(self.temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
            if _lock(descriptor) is not False and _is_at(descriptor, self.temporary):
                break
            os.close(descriptor)  # another process took it for a left-over and removed it before it was locked
        self._lock = os.dup(descriptor)  # keeps the lock after `file` is closed, until the rename
        self.file: IO[bytes] = os.fdopen(descriptor, "wb", buffering=1 << 20)
        self._open = True

    def close(self) -> None:
        """Write the buffered rest, and close the file; OSError when the disk refuses. The lock is kept."""
        self.file.close()

    def commit(self) -> None:
        """Rename the file to its final path, replacing an existing one."""
        self.close()
        os.replace(self.temporary, self.path)
        self._release()

    def discard(self) -> None:
        """Remove the file, unless it was committed."""
        if not self._open:
            return
        with suppress(OSError):  # the buffered rest may not fit on the disk
            self.file.close()
        with suppress(OSError):
            self.temporary.unlink(missing_ok=True)
        self._release()

    def _release(self) -> None:
        self._open = False
        os.close(self._lock)

    def __enter__(self) -> PendingFile:
        return self

    def __exit__(self, *error: object) -> None:
        self.discard()


def write_whole(path: str | Path, content: str | bytes) -> None:
    """Write a file atomically: afterwards it has its old content or all of `content`. Text is encoded as UTF-8.

    A link is replaced, not followed. A device or a pipe is written to.

    Raises:
        OSError: writing failed.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    if _is_stream(path):
        with open(path, "wb") as file:
            file.write(data)
        return
    with PendingFile(path) as pending:
        pending.file.write(data)
        pending.commit()


def _is_stream(path: str | Path) -> bool:
    """Return whether a path leads to a device or a pipe, which can only be written to, not replaced."""
    if os.path.abspath(path).startswith(("/dev/std", "/dev/fd/", "/proc/")):
        return True
    try:
        return not stat.S_ISREG(os.stat(path).st_mode)
    except OSError:
        return False


class PendingDirectory:
    """A directory under a temporary name: fill `temporary`, then call `commit`. Without `commit`, the directory is removed.

    Args:
        path: the final path. Its parents are created.
        made_by: name of the tool, for the marker file that allows to replace the directory later.
    """

    def __init__(self, path: Path, made_by: str) -> None:
        self.path, self._made_by = path, made_by
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.with_name(f".{path.name}"))
        while True:
            self.temporary = path.with_name(f".{path.name}{_ending()}")
            self.temporary.mkdir()
            with suppress(FileNotFoundError):  # another process took it for a left-over before it was locked
                self._lock = os.open(self.temporary / MARKER, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
                if _lock(self._lock) is not False and _is_at(self._lock, self.temporary / MARKER):
                    break
                os.close(self._lock)
        self._open = True

    def commit(self, path: Path | None = None, *, marked: bool = True) -> None:
        """Rename the directory to its final path, replacing an existing one; check that first with `check_replaceable`.

        Args:
            path: another final path than that of the constructor.
            marked: write the marker file.
        """
        path = path or self.path
        if marked:
            write_marker(self.temporary, self._made_by, os.listdir(self.temporary))
        else:
            (self.temporary / MARKER).unlink()
        aside = path.with_name(f".{path.name}{_ending()}")
        # A rename cannot replace a directory, so the old one is renamed first.
        if path.exists():
            os.replace(path, aside)
        os.replace(self.temporary, path)
        self._release()
        shutil.rmtree(aside, ignore_errors=True)

    def discard(self) -> None:
        """Remove the directory, unless it was committed."""
        if self._open:
            shutil.rmtree(self.temporary, ignore_errors=True)
            self._release()

    def _release(self) -> None:
        self._open = False
        os.close(self._lock)

    def __enter__(self) -> PendingDirectory:
        return self

    def __exit__(self, *error: object) -> None:
        self.discard()


def remove_leftovers(path: Path) -> None:
    """Remove the temporary files and directories of killed writers of `path`, as far as they can be removed."""
    pattern = re.compile(re.escape(path.name) + TEMPORARY)
    with suppress(OSError):
        for entry in list(os.scandir(path.parent)):
            if pattern.fullmatch(entry.name) and not entry.is_symlink():
                with suppress(OSError):
                    _remove_leftover(Path(entry.path), entry.is_dir(follow_symlinks=False))


def _remove_leftover(path: Path, directory: bool) -> None:
    """Remove a temporary file or directory if its writer has ended, which its lock shows."""
    with suppress(FileNotFoundError):
        descriptor = os.open(path / MARKER if directory else path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            if _lock(descriptor):
                shutil.rmtree(path) if directory else path.unlink()
        finally:
            os.close(descriptor)
        return
    if directory:
        path.rmdir()  # a directory without a marker yet; OSError if its writer has created one meanwhile


def _ending() -> str:
    """Return a new suffix of a temporary name."""
    return f".{os.getpid()}-{secrets.token_hex(4)}.tmp"


def _lock(descriptor: int) -> bool | None:
    """Try to lock a file; return whether this process holds the lock now, None if the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    """Return whether an open file is still at this path."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False
