"""Write files and directories that appear under their name whole, or not at all.

They are written under a temporary name beside it, `NAME.<pid>-<random>.tmp`, and a lock of the kernel is held on that while
the writer lives, whatever ends it. So the next writer of the same name can tell what a killed one left, and removes it, from
what another one is still writing. Where the file system knows no locks, left-over files stay.
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
    """A file under its temporary name: write to `file`, then `commit`. Anything else leaves nothing behind.

    Attributes:
        path: where it is to be; what is there stays until then.
        temporary: its name until then.
        file: opened for writing bytes.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        remove_leftovers(self.path)
        while True:
            self.temporary = self.path.with_name(self.path.name + _ending())
            # Exclusive, so that nobody else's file or link of this name is written to.
            descriptor = os.open(self.temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
            if _lock(descriptor) is not False and _is_at(descriptor, self.temporary):
                break
            os.close(descriptor)  # taken for a left-over file before it was locked
        self._lock = os.dup(descriptor)  # the file is closed before it has its name
        self.file: IO[bytes] = os.fdopen(descriptor, "wb", buffering=1 << 20)
        self._open = True

    def close(self) -> None:
        """Finish writing; OSError when the disk refuses the rest. The temporary name stays reserved."""
        self.file.close()

    def commit(self) -> None:
        """Give the file its name, in place of what had it."""
        self.close()
        os.replace(self.temporary, self.path)
        self._release()

    def discard(self) -> None:
        """Remove it, unless it was committed."""
        if not self._open:
            return
        with suppress(OSError):  # what is in the buffer
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
    """Write a file in one step: it is as before, or holds all of `content`, text in UTF-8. OSError when that fails.

    A link is replaced and not followed. A device, a pipe or the like is written to.
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
    """Return whether a name stands for something that only takes bytes: a device or a pipe, also a redirected one."""
    if os.path.abspath(path).startswith(("/dev/std", "/dev/fd/", "/proc/")):
        return True
    try:
        return not stat.S_ISREG(os.stat(path).st_mode)
    except OSError:
        return False


class PendingDirectory:
    """A directory under its temporary name: fill `temporary`, then `commit`. Anything else leaves nothing behind.

    Args:
        path: where it is to be. Its parents are made.
        made_by: name of the tool, for the note that lets a tool replace it later.
    """

    def __init__(self, path: Path, made_by: str) -> None:
        self.path, self._made_by = path, made_by
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.with_name(f".{path.name}"))
        while True:
            self.temporary = path.with_name(f".{path.name}{_ending()}")
            self.temporary.mkdir()
            with suppress(FileNotFoundError):  # taken for a left-over directory before it was locked
                self._lock = os.open(self.temporary / MARKER, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
                if _lock(self._lock) is not False and _is_at(self._lock, self.temporary / MARKER):
                    break
                os.close(self._lock)
        self._open = True

    def commit(self, path: Path | None = None, *, marked: bool = True) -> None:
        """Give the directory its name, in place of what had it: check before that it may go (`check_replaceable`).

        Args:
            path: another name than the one it was made for.
            marked: whether the note stays in it.
        """
        path = path or self.path
        if marked:
            write_marker(self.temporary, self._made_by, os.listdir(self.temporary))
        else:
            (self.temporary / MARKER).unlink()
        aside = path.with_name(f".{path.name}{_ending()}")
        # A directory cannot be replaced by a rename, so the old one steps aside first.
        if path.exists():
            os.replace(path, aside)
        os.replace(self.temporary, path)
        self._release()
        shutil.rmtree(aside, ignore_errors=True)

    def discard(self) -> None:
        """Remove it, unless it was committed."""
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
    """Remove what killed writers of `path` left under temporary names beside it. What cannot be removed stays."""
    pattern = re.compile(re.escape(path.name) + TEMPORARY)
    with suppress(OSError):
        for entry in list(os.scandir(path.parent)):
            if pattern.fullmatch(entry.name) and not entry.is_symlink():
                with suppress(OSError):
                    _remove_leftover(Path(entry.path), entry.is_dir(follow_symlinks=False))


def _remove_leftover(path: Path, directory: bool) -> None:
    """Remove a temporary file or directory whose writer is gone."""
    with suppress(FileNotFoundError):
        descriptor = os.open(path / MARKER if directory else path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            if _lock(descriptor):
                shutil.rmtree(path) if directory else path.unlink()
        finally:
            os.close(descriptor)
        return
    if directory:
        path.rmdir()  # its writer had not come further; OSError when it has meanwhile


def _ending() -> str:
    """Return a new ending of a temporary name."""
    return f".{os.getpid()}-{secrets.token_hex(4)}.tmp"


def _lock(descriptor: int) -> bool | None:
    """Try to lock a file; return whether this process has it now, None where the file system knows no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    """Return whether an open file still has this name."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False
