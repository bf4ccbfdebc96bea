"""Mistakes in a path that is to be read, with what may have been meant."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from megatron.files.foreign import is_lfs_pointer, recognize_hub_name
from megatron.files.regular import describe_file_kind


def near(path: Path, names: list[str] | None = None) -> str:
    """`; near it: ...` for a path that is not there; the folder to blame when that is missing as well."""
    folder = path.parent
    if names is None:
        if not os.path.isdir(folder):
            while not os.path.isdir(folder):
                path, folder = folder, folder.parent
            return f"; {folder} has no {path.name}" + near(path)
        try:
            names = [entry.name for entry in os.scandir(folder)]
        except OSError as error:
            return f"; {folder} cannot be read: {error.strerror}"
    close = difflib.get_close_matches(path.name, names, n=3, cutoff=0.6)
    return f"; near it: {', '.join(str(folder / name) for name in close)}" if close else ""


def reason_unreadable(path: Path, flag: str = "") -> str | None:
    """Return why a file cannot be read; None when it can. flag: its flag, where the name of a model may stand instead."""
    if os.path.isdir(path):
        return "is a directory, not a file"
    if not os.path.exists(path):
        nearby = near(path)
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


def within(save: str | None, name: str) -> str | None:
    """Return the path of a file in the directory of --save; None without one."""
    return None if save is None else str(Path(save) / name)
