"""What --save and --load name, as far as names of files tell: whether they are one directory, whether checkpoints are in it."""

from __future__ import annotations

import os
import re
from pathlib import Path

MANIFEST = "manifest.json"  # written last into a checkpoint
TRACKER = "latest_checkpointed_iteration.txt"


def same_directory(first: str | None, second: str | None) -> bool:
    """Whether two names mean one directory, also by way of links, and where it is not there yet."""
    if first is None or second is None:
        return False
    try:
        if os.path.samefile(first, second):
            return True
    except OSError:
        pass  # one of them is not there
    return os.path.realpath(first) == os.path.realpath(second)


def iterations(root: Path) -> list[int]:
    """The iterations that a directory of checkpoints holds, whole or not, in order. OSError where it cannot be read."""
    found = (re.fullmatch(r"iter_(\d+)", entry.name) for entry in os.scandir(root) if entry.is_dir())
    return sorted(int(match[1]) for match in found if match)


def checkpoint_entries(root: Path) -> list[str]:
    """Names in a directory that show that a checkpoint was finished in it once, whole or not, in order.

    Empty also for a directory that is not there. OSError where it cannot be read.
    """
    if not os.path.isdir(root):
        return []
    return sorted(name for name in os.listdir(root) if name in (MANIFEST, TRACKER) or re.match(r"iter_\d+(\.replaced)?$", name))
