"""Check where a tool may write: never over its own input, and over a directory only if a tool of this project made it.

Two paths are equal if they resolve to the same file (device and inode), whether by symlinks, hard links or `..`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from megatron.files.regular import describe_file_kind, error_reason, open_regular, read_json

MARKER = ".made-by-megatron"  # file in each directory that a tool of this project created, and may later replace
TEMPORARY = r"\.\d+(-[0-9a-f]{8})?\.tmp"  # the suffix of temporary names; see files/pending.py
MAX_MARKER_BYTES = 1 << 20  # bytes of the marker file
CHECKPOINT_FILES = ("manifest.json", "state.json")  # a checkpoint has at least one of them, even if it is damaged
SVG = (b"<svg", b"<?xml")
KERNEL_MOUNTS = ("/proc", "/sys")  # the kernel's file systems, in which no files can be created
SUFFIX_BYTES = 32  # maximum length of the suffix that files/pending.py appends to a name
MAX_NAME_BYTES = 255  # maximum length of a file name on common file systems


class OutputError(Exception):
    """An output would replace something that must not be replaced, or cannot be written. Tools exit with status 2."""


class InputPaths:
    """The files and directories that a command reads, resolved once and then compared with each of its outputs."""

    def __init__(self, paths: Iterable[str | Path]) -> None:
        self.paths = list(paths)
        self._by_key = {_file_key(path): path for path in self.paths}

    def find_conflict(self, path: str | Path) -> str | Path | None:
        """Return the input that writing the output `path` would change; None if there is none.

        Such an input is the path itself, a directory above it, or a directory with a hard link to it.
        """
        same = self._by_key.get(_file_key(path))
        parents = (self._by_key[key] for key in _keys_upwards(path) if key in self._by_key)
        conflict = same if same is not None else next(filter(os.path.isdir, parents), None)
        if conflict is None and os.path.isfile(path) and os.stat(path).st_nlink > 1:
            directories = filter(os.path.isdir, self.paths)
            conflict = next((directory for directory in directories if _has_hard_link(directory, path)), None)
        return conflict


def reason_unwritable(folder: str | Path) -> str | None:
    """Return why files cannot be written into an existing or new directory; None if they can. Nothing is created.

    The reason completes a message that begins with the directory: `cannot be written: permission denied in /data`.
    """
    if "\0" in os.fspath(folder):
        return "is not a directory name: it contains a null byte"
    path = Path(os.path.abspath(folder))
    # A new directory would be created in the nearest one that exists.
    while not os.path.lexists(path):
        if len(os.fsencode(path.name)) > MAX_NAME_BYTES:
            return f"cannot be made: a name in it has more than {MAX_NAME_BYTES} bytes"
        path = path.parent
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return f"cannot be written: {path} is a link to {os.readlink(path)}, which does not exist"
    except OSError as error:
        return f"cannot be written: {path}: {error_reason(error)}"
    if not os.path.isdir(path):
        return f"cannot be written: {path} is {describe_file_kind(status.st_mode) or 'a file'}, not a directory"
    if any(os.path.ismount(mount) and os.stat(mount).st_dev == status.st_dev for mount in KERNEL_MOUNTS):
        return f"cannot be written: {path} belongs to the kernel, and no file can be made there"
    if os.statvfs(path).f_flag & os.ST_RDONLY:
        return f"cannot be written: {path} is on a file system that is mounted read-only"
    if not os.access(path, os.W_OK | os.X_OK):
        return f"cannot be written: permission denied in {path}"
    return None


def _check_writable(flag: str, output: str | Path, folder: str | Path) -> None:
    """Raise OutputError unless files can be written into `folder`: the output itself or its parent directory."""
    if why := reason_unwritable(folder):
        raise OutputError(f"{flag} {output}: {why}; choose another place")


def check_file(flag: str, output: str | Path, reads: InputPaths) -> None:
    """Raise OutputError unless a command may write this file.

    Args:
        flag: the flag that names the file, for the message.
        output: the file; it need not exist.
        reads: the command's inputs. Every file in an input directory is an input, too.
    """
    if os.path.isdir(output):
        raise OutputError(f"{flag} {output}: is a directory, not a file")
    if (read := reads.find_conflict(output)) is not None:
        what = "is in" if os.path.isdir(read) else "is"
        raise OutputError(f"{flag} {output}: {what} {read}, which this command reads; choose another place")
    if os.path.exists(output) and not os.path.isfile(output):  # a device or a pipe is written to, not replaced
        if not os.access(output, os.W_OK):
            raise OutputError(f"{flag} {output}: cannot be written: permission denied; choose another place")
    elif not os.path.abspath(output).startswith(("/dev/fd/", "/dev/std", "/proc/self/fd/")):
        if len(os.fsencode(os.path.basename(output))) > MAX_NAME_BYTES - SUFFIX_BYTES:
            raise OutputError(f"{flag} {output}: cannot be written: its name is too long; choose another one")
        _check_writable(flag, output, os.path.dirname(os.path.abspath(output)))


def files_in(path: str | Path) -> list[str | Path]:
    """Return the files directly in a directory; for a file, return the file itself."""
    with suppress(OSError):  # an unreadable directory is returned itself, as a file is
        if os.path.isdir(path):
            return [entry.path for entry in os.scandir(path) if not entry.is_dir()]
    return [path]


def check_picture(flag: str, output: str | Path, reads: Iterable[str | Path] = ()) -> None:
    """Raise OutputError unless a command may write this SVG picture: as `check_file`, and an existing file must be an SVG.

    Args:
        flag: the flag that names the file, for the message.
        output: the file; it need not exist.
        reads: every file and directory that the command reads.
    """
    check_file(flag, output, InputPaths(reads))
    with suppress(OSError):
        if os.path.isfile(output) and os.path.getsize(output):
            with open_regular(output) as file:
                if not file.read(64).lstrip().startswith(SVG):
                    raise OutputError(f"{flag} {output}: exists and is not an SVG picture; choose another place")


def check_folder(flag: str, output: str | Path, reads: Iterable[str | Path]) -> None:
    """Raise OutputError unless a command may add files to this directory: it is writable and none of the command's inputs.

    Args:
        flag: the flag that names the directory, for the message.
        output: the directory; it need not exist.
        reads: every file and directory that the command reads.
    """
    _check_writable(flag, output, output)
    for read in reads:
        if _file_key(output) == _file_key(read):
            raise OutputError(f"{flag} {output}: is {read}, which this command reads; choose another place")


def check_replaceable(flag: str, output: str | Path, reads: Sequence[str | Path], *, overwrite: bool) -> Path:
    """Check that a command may create this directory, or replace it as a whole.

    Args:
        flag: the flag that names the directory, for the message.
        output: the directory; it need not exist.
        reads: every file and directory that the command reads.
        overwrite: an existing directory may be replaced.

    Returns:
        The directory's real path.

    Raises:
        OutputError: the directory is, contains or is inside an input of the command; it is a symlink; it contains the current
            directory; or it is not empty and `overwrite` is false, no tool of this project created it, or it contains an entry
            that the tool did not write.
    """
    real = Path(os.path.realpath(output))
    if os.path.islink(os.path.abspath(output)):
        raise OutputError(f"{flag} {output}: is a symlink to {real}; give that path instead")
    check_folder(flag, output, reads)
    _check_writable(flag, output, real.parent)  # the temporary directory is created and renamed there
    for read in reads:
        if _file_key(output) in _keys_upwards(read) or _file_key(read) in _keys_upwards(output):
            what = "contains" if _file_key(output) in _keys_upwards(read) else "is in"
            raise OutputError(f"{flag} {output}: {what} {read}, which this command reads; choose another place")
    if _file_key(real) in _keys_upwards(os.getcwd()):
        raise OutputError(f"{flag} {output}: is or contains the directory that this command runs in; choose another place")
    if not real.is_dir() or not any(real.iterdir()):
        return real
    if not overwrite:
        raise OutputError(f"{flag} {output}: is not empty; choose another place, or pass --overwrite")
    if (others := unexpected_entries(real)) is None:
        why = f"it was not made by this project's tools (there is no {MARKER} in it)"
        raise OutputError(f"{flag} {output}: {why}, so --overwrite does not remove it; choose another place, or remove it")
    if others:
        why = f"it contains files that the tool did not write: {', '.join(others[:5])}"
        raise OutputError(f"{flag} {output}: {why}; remove them first, or choose another place")
    return real


def holds_other_files(directory: Path) -> bool:
    """Return whether a directory is not empty and is not a checkpoint, so that no save may replace it."""
    if not os.path.isdir(directory) or not (names := os.listdir(directory)):
        return False
    return not any(name in CHECKPOINT_FILES or name.startswith("shard_") for name in names)


def write_marker(directory: Path, made_by: str, names: Iterable[str]) -> None:
    """Write the marker file of a directory, which permits a later command to replace the directory.

    Args:
        directory: the directory.
        made_by: name of the tool that created it.
        names: names of all its entries; if others are found later, the tool did not write them, and it is not replaced.
    """
    note = {"made_by": made_by, "entries": sorted({*names, MARKER})}
    (directory / MARKER).write_text(json.dumps(note, indent=1) + "\n", encoding="utf-8")


def unexpected_entries(directory: Path) -> list[str] | None:
    """Return the entries of a directory that its marker does not name; None if it has no marker."""
    try:
        entries = read_json(directory / MARKER, MAX_MARKER_BYTES)["entries"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if not isinstance(entries, list):
        return None
    # Temporary files, which a killed command has left, are ignored: the tool wrote them as well.
    return sorted(name for name in {*os.listdir(directory)} - {*entries} if not re.search(TEMPORARY + "$", name))


def _file_key(path: str | Path) -> tuple[int, int] | str:
    """Return a key that is equal for all paths to the same file: device and inode, or the real path if it does not exist."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return os.path.realpath(path)
    return status.st_dev, status.st_ino


def _keys_upwards(path: str | Path) -> Iterator[tuple[int, int] | str]:
    """Yield the file keys of a path and of all directories above it."""
    real = Path(os.path.realpath(path))
    yield from map(_file_key, (path, *real.parents))


def _has_hard_link(directory: str | Path, path: str | Path) -> bool:
    """Return whether a directory, at any depth, contains a hard link to this file."""
    key = _file_key(path)
    return any(_file_key(os.path.join(folder, name)) == key for folder, _, names in os.walk(directory) for name in names)
