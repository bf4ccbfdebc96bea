"""Check that input files can be read, and suggest similar paths for those that do not exist."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from megatron.files.foreign import is_lfs_pointer, recognize_hub_name
from megatron.files.regular import describe_file_kind


def suggest_paths(path: Path, names: list[str] | None = None) -> str:
    """Return `; near it: ...` with up to three paths that resemble a path that does not exist; empty if there are none.

    If the path's directory does not exist either, the returned text names the first missing directory instead.

    Args:
        path: the path that does not exist.
        names: names to compare with; by default, those of all entries of the path's directory.
    """
    folder = path.parent
    if names is None:
        if not os.path.isdir(folder):
            while not os.path.isdir(folder):  # after the loop, `folder` exists, and `path` is the missing entry in it
                path, folder = folder, folder.parent
            return f"; {folder} has no {path.name}" + suggest_paths(path)
        try:
            names = [entry.name for entry in os.scandir(folder)]
        except OSError as error:
            return f"; {folder} cannot be read: {error.strerror}"
    close = difflib.get_close_matches(path.name, names, n=3, cutoff=0.6)
    return f"; near it: {', '.join(str(folder / name) for name in close)}" if close else ""


def reason_unreadable(path: Path, flag: str = "") -> str | None:
    """Return the reason why a file cannot be used as an input; None if it can.

    Args:
        path: the file.
        flag: the flag that names it; given where users may type a model's name on the Hugging Face Hub by mistake.
    """
    if os.path.isdir(path):
        return "is a directory, not a file"
    if not os.path.exists(path):
        # A name on the Hub has the form of a relative path, so a misspelled path is the likelier cause if a similar one exists.
        nearby = suggest_paths(path)
        next_step = "give DIR" if flag == "--tokenizer-model" else f"give {flag} its file in DIR"
        hub_name = recognize_hub_name(path, next_step) if flag and not nearby.startswith("; near it") else None
        return f"is {hub_name}" if hub_name else f"does not exist{nearby}"
    if kind := describe_file_kind(path.stat().st_mode):
        return f"is {kind}, not a regular file"
    if not os.access(path, os.R_OK):
        return "cannot be read: permission denied"
    if is_lfs_pointer(path):
        return "is a pointer of Git LFS, in place of the file itself; run `git lfs pull` where it was cloned"
    return None if path.stat().st_size else "is empty"


def path_in_save(save: str | None, name: str) -> str | None:
    """Return the path of a file or directory in --save; None if --save is not given."""
    return None if save is None else str(Path(save) / name)
