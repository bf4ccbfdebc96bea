"""Look into the directories of --save and --load by file names alone: whether they are the same, and hold checkpoints."""

from __future__ import annotations

import os
import re
from pathlib import Path

MANIFEST = "manifest.json"  # written last, so a checkpoint without it is unfinished
TRACKER = "latest_checkpointed_iteration.txt"  # Megatron-LM's name; holds the number of the newest checkpoint


def same_directory(first: str | None, second: str | None) -> bool:
    """Return whether two paths are the same directory, following links; the directory need not exist yet."""
    if first is None or second is None:
        return False
    try:
        if os.path.samefile(first, second):
            return True
    except OSError:
        pass  # one of them does not exist; compare the paths instead
    return os.path.realpath(first) == os.path.realpath(second)


def list_iterations(root: Path) -> list[int]:
    """Return the iterations in a directory of checkpoints, finished or not, in order. OSError when it cannot be read."""
    found = (re.fullmatch(r"iter_(\d+)", entry.name) for entry in os.scandir(root) if entry.is_dir())
    return sorted(int(match[1]) for match in found if match)


def checkpoint_entries(root: Path) -> list[str]:
    """Return the names in a directory that a checkpoint leaves behind, sorted; empty when the directory does not exist.

    OSError when it cannot be read.
    """
    if not os.path.isdir(root):
        return []
    # `.replaced` is an older checkpoint, set aside while a new one of the same iteration is moved into its place.
    return sorted(name for name in os.listdir(root) if name in (MANIFEST, TRACKER) or re.match(r"iter_\d+(\.replaced)?$", name))
