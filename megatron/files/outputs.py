"""Check where a tool may write: never over its own input, and over a directory only if a tool of this project made it.

Paths are compared by the files that they lead to, so links, hard links, relative paths and `..` make no difference.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from megatron.files.regular import describe_file_kind, error_reason, open_regular, read_json

MARKER = ".made-by-megatron"  # the file that marks a directory which a tool has made, and may replace
TEMPORARY = r"\.\d+(-[0-9a-f]{8})?\.tmp"  # the suffix of temporary names; see files/pending.py
MAX_MARKER = 1 << 20  # bytes of the marker file
CHECKPOINT_FILES = ("manifest.json", "state.json")  # every checkpoint, even a damaged one, has at least one of them
SVG = (b"<svg", b"<?xml")
KERNEL = ("/proc", "/sys")  # the kernel's file systems, in which no files can be created
SUFFIX_BYTES = 32  # bytes of a name that files/pending.py needs for its suffix
MAX_NAME_BYTES = 255  # length of a file's name on common file systems


class OutputError(Exception):
    """An output would replace something that must not be replaced, or cannot be written. Tools exit with status 2."""


class InputPaths:
    """The files and directories that a command reads, looked up once for any number of outputs."""

    def __init__(self, paths: Iterable[str | Path]) -> None:
        self.paths = list(paths)
        self._by_place = {_place(path): path for path in self.paths}

    def find_conflict(self, path: str | Path) -> str | Path | None:
        """Return the input that an output would replace; None for none.

        Such an input is the path itself, a directory above it, or a directory with a hard link to it.
        """
        own = self._by_place.get(_place(path))
        above = (self._by_place[place] for place in _upwards(path) if place in self._by_place)
        found = own if own is not None else next(filter(os.path.isdir, above), None)
        if found is None and os.path.isfile(path) and os.stat(path).st_nlink > 1:
            found = next((read for read in self.paths if os.path.isdir(read) and _links_to(read, path)), None)
        return found


def reason_unwritable(folder: str | Path) -> str | None:
    """Return why no file can be written into an existing or new directory, as the rest of a sentence about it; None if one can.

    Nothing is created for this check.
    """
    if "\0" in os.fspath(folder):
        return "is no name of a directory: it holds a null byte"
    path = Path(os.path.abspath(folder))
    # A new directory would be created in the nearest one that exists.
    while not os.path.lexists(path):
        if len(os.fsencode(path.name)) > MAX_NAME_BYTES:
            return f"cannot be made: a name in it has more than {MAX_NAME_BYTES} bytes"
        path = path.parent
    try:
        about = os.stat(path)
    except FileNotFoundError:
        return f"cannot be written: {path} is a link to {os.readlink(path)}, which does not exist"
    except OSError as error:
        return f"cannot be written: {path}: {error_reason(error)}"
    if not os.path.isdir(path):
        return f"cannot be written: {path} is {describe_file_kind(about.st_mode) or 'a file'}, not a directory"
    if any(os.path.ismount(place) and os.stat(place).st_dev == about.st_dev for place in KERNEL):
        return f"cannot be written: {path} belongs to the kernel, and no file can be made there"
    if os.statvfs(path).f_flag & os.ST_RDONLY:
        return f"cannot be written: {path} is on a file system that is mounted read-only"
    if not os.access(path, os.W_OK | os.X_OK):
        return f"cannot be written: permission denied in {path}"
    return None


def _check_place(flag: str, output: str | Path, folder: str | Path) -> None:
    """Raise OutputError unless files can be written into the directory `folder`, which is or holds the output."""
    if why := reason_unwritable(folder):
        raise OutputError(f"{flag} {output}: {why}; choose another place")


def check_file(flag: str, output: str | Path, reads: InputPaths) -> None:
    """Raise OutputError unless a command may write this file.

    Args:
        flag: the flag that names the file, for the message.
        output: the file; it need not exist.
        reads: the command's input. A file in a directory that is read counts as read.
    """
    if os.path.isdir(output):
        raise OutputError(f"{flag} {output}: is a directory, not a file")
    if (read := reads.find_conflict(output)) is not None:
        what = "lies in" if os.path.isdir(read) else "is"
        raise OutputError(f"{flag} {output}: {what} {read}, which this command reads; choose another place")
    if os.path.exists(output) and not os.path.isfile(output):  # a device or a pipe, which is not replaced
        if not os.access(output, os.W_OK):
            raise OutputError(f"{flag} {output}: cannot be written: permission denied; choose another place")
    elif not os.path.abspath(output).startswith(("/dev/fd/", "/dev/std", "/proc/self/fd/")):
        if len(os.fsencode(os.path.basename(output))) > MAX_NAME_BYTES - SUFFIX_BYTES:
            raise OutputError(f"{flag} {output}: cannot be written: its name is too long; choose another one")
        _check_place(flag, output, os.path.dirname(os.path.abspath(output)))


def files_in(path: str | Path) -> list[str | Path]:
    """Return the files directly in a directory; for a file, return the file itself."""
    with suppress(OSError):  # a directory that cannot be read is returned itself
        if os.path.isdir(path):
            return [entry.path for entry in os.scandir(path) if not entry.is_dir()]
    return [path]


def check_picture(flag: str, output: str | Path, reads: Iterable[str | Path] = ()) -> None:
    """Raise OutputError unless a command may write an SVG picture there: see `check_file`; only SVG files are overwritten.

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
                    raise OutputError(f"{flag} {output}: is there already and is no SVG picture; choose another place")


def check_folder(flag: str, output: str | Path, reads: Iterable[str | Path]) -> None:
    """Raise OutputError unless a command may add files to this directory, which must not be its input.

    Args:
        flag: the flag that names the directory, for the message.
        output: the directory; it need not exist.
        reads: every file and directory that the command reads.
    """
    _check_place(flag, output, output)
    for read in reads:
        if _place(output) == _place(read):
            raise OutputError(f"{flag} {output}: is {read}, which this command reads; choose another place")


def check_replaceable(flag: str, output: str | Path, reads: Sequence[str | Path], *, overwrite: bool) -> Path:
    """Check that a command may create this directory, or replace it as a whole.

    Args:
        flag: the flag that names the directory, for the message.
        output: the directory; it need not exist.
        reads: every file and directory that the command reads.
        overwrite: the user allows to replace an existing directory.

    Returns:
        The directory's real path.

    Raises:
        OutputError: the directory is an input of the command, contains one or lies in one; it is a link; it was not made by a
            tool of this project and is not empty; or it holds a file that the tool did not write.
    """
    real = Path(os.path.realpath(output))
    if os.path.islink(os.path.abspath(output)):
        raise OutputError(f"{flag} {output}: is a link, to {real}; name that itself")
    check_folder(flag, output, reads)
    _check_place(flag, output, real.parent)  # where it is renamed
    for read in reads:
        if _place(output) in _upwards(read) or _place(read) in _upwards(output):
            what = "holds" if _place(output) in _upwards(read) else "lies in"
            raise OutputError(f"{flag} {output}: {what} {read}, which this command reads; choose another place")
    if _place(real) in _upwards(os.getcwd()):
        raise OutputError(f"{flag} {output}: is the directory that this command runs in, or holds it; choose another place")
    if not real.is_dir() or not any(real.iterdir()):
        return real
    if not overwrite:
        raise OutputError(f"{flag} {output}: it is not empty; choose another place, or pass --overwrite")
    if (others := unexpected_entries(real)) is None:
        why = f"it was not made by this project's tools (there is no {MARKER} in it)"
        raise OutputError(f"{flag} {output}: {why}, so --overwrite does not remove it; choose another place, or take it away")
    if others:
        why = f"it holds what its maker did not write: {', '.join(others[:5])}"
        raise OutputError(f"{flag} {output}: {why}; take that away first, or choose another place")
    return real


def holds_other_files(directory: Path) -> bool:
    """Return whether a directory named like a checkpoint holds something else, which no save may replace."""
    if not os.path.isdir(directory) or not (names := os.listdir(directory)):
        return False
    return not any(name in CHECKPOINT_FILES or name.startswith("shard_") for name in names)


def write_marker(directory: Path, made_by: str, names: Iterable[str]) -> None:
    """Write the marker file of a directory, which allows to replace it later.

    Args:
        directory: the directory.
        made_by: name of the tool that made it.
        names: names of all its entries; others that are found later are not the tool's, and prevent the replacement.
    """
    note = {"made_by": made_by, "entries": sorted({*names, MARKER})}
    (directory / MARKER).write_text(json.dumps(note, indent=1) + "\n", encoding="utf-8")


def unexpected_entries(directory: Path) -> list[str] | None:
    """Return the entries of a directory that its marker does not name; None if it has no marker."""
    try:
        entries = read_json(directory / MARKER, MAX_MARKER)["entries"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if not isinstance(entries, list):
        return None
    # Temporary files that a killed command has left are the tool's as well.
    return sorted(name for name in {*os.listdir(directory)} - {*entries} if not re.search(TEMPORARY + "$", name))


def _place(path: str | Path) -> tuple[int, int] | str:
    """Return a key that is equal for all paths to the same file: device and inode, or the real path if it does not exist."""
    try:
        about = os.stat(path)
    except (OSError, ValueError):
        return os.path.realpath(path)
    return about.st_dev, about.st_ino


def _upwards(path: str | Path) -> Iterator[tuple[int, int] | str]:
    """Yield the keys of a path and of all directories above it."""
    real = Path(os.path.realpath(path))
    yield from map(_place, (path, *real.parents))


def _links_to(directory: str | Path, path: str | Path) -> bool:
    """Return whether a directory holds a hard link to this file."""
    place = _place(path)
    return any(_place(os.path.join(folder, name)) == place for folder, _, names in os.walk(directory) for name in names)
