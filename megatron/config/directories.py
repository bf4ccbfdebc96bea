"""Inspect the directories of --save and --load without opening files: compare their paths, and list their checkpoints."""

from __future__ import annotations

import os
import re
from pathlib import Path

MANIFEST = "manifest.json"  # the last file that is written to a checkpoint; without it the checkpoint is incomplete
TRACKER = "latest_checkpointed_iteration.txt"  # contains the iteration of the newest checkpoint; the name is Megatron-LM's


def same_directory(first: str | None, second: str | None) -> bool:
    """Return whether two paths name the same directory after following symlinks; it need not exist. False if one is None."""
    if first is None or second is None:
        return False
    try:
        if os.path.samefile(first, second):
            return True
    except OSError:
        pass  # one of them does not exist or cannot be read; compare the resolved paths instead
    return os.path.realpath(first) == os.path.realpath(second)


def list_iterations(root: Path) -> list[int]:
    """Return the iterations of the checkpoints in a directory, complete or not, in order. OSError if it cannot be read."""
    matches = (re.fullmatch(r"iter_(\d+)", entry.name) for entry in os.scandir(root) if entry.is_dir())
    return sorted(int(match[1]) for match in matches if match)


def checkpoint_entries(root: Path) -> list[str]:
    """Return the names in a directory that belong to checkpoints, sorted; empty if the directory does not exist.

    Raises:
        OSError: the directory cannot be read.
    """
    if not os.path.isdir(root):
        return []
    # `.replaced` is the suffix of an older checkpoint that is being replaced by a new one of the same iteration.
    return sorted(name for name in os.listdir(root) if name in (MANIFEST, TRACKER) or re.match(r"iter_\d+(\.replaced)?$", name))
