"""Check paths that are to be read, and suggest what may have been meant."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from megatron.files.foreign import is_lfs_pointer, recognize_hub_name
from megatron.files.regular import describe_file_kind


def suggest_paths(path: Path, names: list[str] | None = None) -> str:
    """Return `; near it: ...`, paths that resemble one that does not exist; empty when none does.

    Names the missing directory instead when the path's directory does not exist either.

    Args:
        path: the path that does not exist.
        names: names to compare with; by default all that its directory holds.
    """
    folder = path.parent
    if names is None:
        if not os.path.isdir(folder):
            while not os.path.isdir(folder):  # up to the first directory that exists; `path` is then what it lacks
                path, folder = folder, folder.parent
            return f"; {folder} has no {path.name}" + suggest_paths(path)
        try:
            names = [entry.name for entry in os.scandir(folder)]
        except OSError as error:
            return f"; {folder} cannot be read: {error.strerror}"
    close = difflib.get_close_matches(path.name, names, n=3, cutoff=0.6)
    return f"; near it: {', '.join(str(folder / name) for name in close)}" if close else ""


def reason_unreadable(path: Path, flag: str = "") -> str | None:
    """Return why a file cannot be read; None when it can.

    Args:
        path: the file.
        flag: the flag that names it, if a user may have given a model's name on the Hugging Face Hub instead.
    """
    if os.path.isdir(path):
        return "is a directory, not a file"
    if not os.path.exists(path):
        # A near miss on the disk is likelier than a name on the Hub, which has the form of a relative path as well.
        nearby = suggest_paths(path)
        then = "give DIR" if flag == "--tokenizer-model" else f"give {flag} its file in DIR"
        hub = recognize_hub_name(path, then) if flag and not nearby.startswith("; near it") else None
        return f"is {hub}" if hub else f"does not exist{nearby}"
    if kind := describe_file_kind(path.stat().st_mode):
        return f"is {kind}, not a regular file"
    if not os.access(path, os.R_OK):
        return "cannot be read: permission denied"
    if is_lfs_pointer(path):
        return "is a pointer of Git LFS, in place of the file itself; run `git lfs pull` where it was cloned"
    return None if path.stat().st_size else "is empty"


def path_in_save(save: str | None, name: str) -> str | None:
    """Return the path of a file in the directory of --save; None when nothing is saved."""
    return None if save is None else str(Path(save) / name)
