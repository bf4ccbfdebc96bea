"""Write files and directories atomically: they appear under their final name when they are complete, or not at all.

They are written under a temporary name in the same directory, `NAME.<pid>-<random>.tmp`, and then renamed. The writer holds an
flock on the temporary file, and the kernel releases it even if the writer is killed. The next writer of the same name removes
unlocked temporary files, which killed writers left behind. On file systems without flock, such files are not removed.
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
        path: the final path; `commit` replaces a file that exists there.
        temporary: the temporary path.
        file: the file, opened for writing bytes.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        remove_leftovers(self.path)
        while True:
            self.temporary = self.path.with_name(self.path.name + _temporary_suffix())
            # O_EXCL fails if the name exists: someone may have planted a symlink.
            descriptor = os.open(self.temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
            if _try_lock(descriptor) is not False and _is_at(descriptor, self.temporary):
                break
            os.close(descriptor)  # another process considered it left behind, and removed it before it was locked
        self._lock = os.dup(descriptor)  # holds the lock until the rename, after `file` is closed
        self.file: IO[bytes] = os.fdopen(descriptor, "wb", buffering=1 << 20)
        self._open = True

    def close(self) -> None:
        """Flush and close the file, still holding its lock; OSError if the flush fails, as on a full disk."""
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
        with suppress(OSError):  # closing flushes, which fails on a full disk
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
    """Write a file atomically: afterwards it has either its old content or all of `content`. Text is encoded as UTF-8.

    A symlink to a file is replaced by the new file. A device or a pipe is written to directly.

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
        made_by: name of the tool, for the marker file that permits to replace the directory later.
    """

    def __init__(self, path: Path, made_by: str) -> None:
        self.path, self._made_by = path, made_by
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.with_name(f".{path.name}"))
        while True:
            self.temporary = path.with_name(f".{path.name}{_temporary_suffix()}")
            self.temporary.mkdir()
            with suppress(FileNotFoundError):  # another process removed the directory before it was locked
                self._lock = os.open(self.temporary / MARKER, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
                if _try_lock(self._lock) is not False and _is_at(self._lock, self.temporary / MARKER):
                    break
                os.close(self._lock)
        self._open = True

    def commit(self, path: Path | None = None, *, marked: bool = True) -> None:
        """Rename the directory to its final path, replacing an existing one, which `check_replaceable` must have allowed.

        Args:
            path: the final path, if not that of the constructor.
            marked: leave the marker file in the directory.
        """
        path = path or self.path
        if marked:
            write_marker(self.temporary, self._made_by, os.listdir(self.temporary))
        else:
            (self.temporary / MARKER).unlink()
        replaced = path.with_name(f".{path.name}{_temporary_suffix()}")
        # A rename cannot replace a directory, so the old one is renamed first.
        if path.exists():
            os.replace(path, replaced)
        os.replace(self.temporary, path)
        self._release()
        shutil.rmtree(replaced, ignore_errors=True)

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
    """Remove the temporary files and directories that killed writers of `path` left behind; errors are ignored."""
    pattern = re.compile(re.escape(path.name) + TEMPORARY)
    with suppress(OSError):
        for entry in list(os.scandir(path.parent)):
            if pattern.fullmatch(entry.name) and not entry.is_symlink():
                with suppress(OSError):
                    _remove_leftover(Path(entry.path), entry.is_dir(follow_symlinks=False))


def _remove_leftover(path: Path, directory: bool) -> None:
    """Remove a temporary file or directory if nothing holds its lock, because its writer has ended."""
    with suppress(FileNotFoundError):
        descriptor = os.open(path / MARKER if directory else path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            if _try_lock(descriptor):
                shutil.rmtree(path) if directory else path.unlink()
        finally:
            os.close(descriptor)
        return
    if directory:
        path.rmdir()  # no marker yet; fails with OSError if its writer has just created one


def _temporary_suffix() -> str:
    """Return a new suffix for a temporary name, which `TEMPORARY` matches."""
    return f".{os.getpid()}-{secrets.token_hex(4)}.tmp"


def _try_lock(descriptor: int) -> bool | None:
    """Try to lock a file; return whether this process now holds the lock, None if the file system does not support flock."""
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
